"""The executor: carries out a rank's list of actions, whatever the schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_lite.blueprint.schedules.actions import Action, Op
from megatron_lite.pipeline.mail import Mail
from megatron_lite.pipeline.stage import MicroBatch, Scored, Stage


@dataclass(slots=True)
class Executor:
    """Stages of this rank, its mail, and whom to tell that a stage's last backward comes next."""

    stages: dict[int, Stage]
    mail: Mail
    arm: Callable[[int], None]

    def run(
        self,
        actions: Sequence[Sequence[Action]],
        batches: Sequence[MicroBatch],
        scale: Tensor | None,
    ) -> list[Scored]:
        """Carry out the groups in order; returns the last stage's answers (empty elsewhere).

        scale: factor on each micro batch's loss sum; None for evaluation.
        """
        mail = self.mail
        for group in actions:
            action = group[0]
            n, m = action.stage, action.microbatch
            match action.op:
                case Op.F:
                    stage = self.stages[n]
                    x = None if stage.is_first else mail.take(forward=True, stage=n, microbatch=m)
                    y = stage.forward(m, batches[m], x, scale)
                    if y is not None:
                        mail.put(y, forward=True, stage=n + 1, microbatch=m)
                case Op.B | Op.I:
                    stage = self.stages[n]
                    dy = None if stage.is_last else mail.take(forward=False, stage=n, microbatch=m)
                    dx = stage.backward(m, dy, postpone_weights=action.op is Op.I)
                    if dx is not None:
                        mail.put(dx, forward=False, stage=n - 1, microbatch=m)
                case Op.W:
                    self.stages[n].gradients.run()
                case Op.REDUCE:
                    self.arm(n)
                case _:
                    mail.post(group)
        mail.finish()
        return [scored for stage in self.stages.values() for scored in stage.take_totals()]
