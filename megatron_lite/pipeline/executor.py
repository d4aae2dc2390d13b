"""The executor: carries out a rank's list of actions, whatever the schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from megatron_lite.blueprint.schedules.actions import Action, Op
from megatron_lite.pipeline.mail import Mail
from megatron_lite.pipeline.stage import MicroBatch, Scored, Stage


def unmeasured(name: str, action: Action | None = None) -> AbstractContextManager[object]:
    """Default: no span is measured."""
    return nullcontext()


def _unheard(position: int, group: Sequence[Action]) -> None:
    """Default: no callback."""


@dataclass(slots=True)
class Executor:
    """Carries actions out on this rank's stages, with its mail, and arms the engine before a last backward.

    begin_last_backward: (stage, what its last W will still report or None where a whole backward comes).

    span: measures a block under a name (forward-compute, forward-recv and so on), told what for.
    reached: told each group and its position before it is carried out, at the end an empty one.
    peak_live: of the last run, the most micro batches (of one stage each) held at once on this rank.
    """

    stages: dict[int, Stage]
    mail: Mail
    begin_last_backward: Callable[[int, Sequence[Tensor] | None], None]
    span: Callable[..., AbstractContextManager[object]] = unmeasured
    peak_live: int = 0
    reached: Callable[[int, Sequence[Action]], None] = _unheard

    def run(
        self,
        actions: Sequence[Sequence[Action]],
        batches: Sequence[MicroBatch],
        scale: Tensor | None,
    ) -> list[Scored]:
        """Carry out the groups in order; returns the last stage's answers (empty elsewhere).

        scale: factor on each micro batch's loss sum; None for evaluation.
        """
        self.peak_live = 0
        for position, group in enumerate(actions):
            self.reached(position, group)
            action = group[0]
            match action.op:
                case Op.F:
                    self._forward(action, batches[action.microbatch], scale)
                case Op.B | Op.I:
                    self._backward(action)
                case Op.W:
                    with self.span("backward-compute", action):
                        self.stages[action.stage].weight_gradients(action.microbatch)
                case Op.REDUCE:  # before the last backward: full buckets are reduced under its rest
                    self.begin_last_backward(action.stage, self._pending_wgrads(action.stage))
                case _:
                    with self.span("send-wait"):  # posting waits, too: sent memory is freed there
                        self.mail.post(group)
        self.reached(len(actions), ())
        with self.span("send-wait"):
            self.mail.finish()
        return [scored for stage in self.stages.values() for scored in stage.take_totals()]

    def _pending_wgrads(self, stage: int) -> list[Tensor] | None:
        """The weights of all deferred wgrads, before the stage's last W; None where a whole backward comes.

        Those of this rank's other stages included: one may hold a wgrad of a table that this stage lends it.
        """
        if self.stages[stage].pending_wgrads is None:
            return None
        return [weight for held in self.stages.values() for weight in held.pending_wgrads or ()]

    def _forward(self, action: Action, batch: MicroBatch, scale: Tensor | None) -> None:
        stage, n, m = self.stages[action.stage], action.stage, action.microbatch
        x = None
        if not stage.is_first:
            with self.span("forward-recv", action):
                x = self.mail.take(forward=True, stage=n, microbatch=m)
        with self.span("forward-compute", action):
            y = stage.forward(m, batch, x, scale)
        # only a forward adds to what is held, so this is where the maximum lies
        self.peak_live = max(self.peak_live, sum(s.num_live for s in self.stages.values()))
        if y is not None:
            self.mail.put(y, forward=True, stage=n + 1, microbatch=m)

    def _backward(self, action: Action) -> None:
        stage, n, m = self.stages[action.stage], action.stage, action.microbatch
        dy = None
        if not stage.is_last:
            with self.span("backward-recv", action):
                dy = self.mail.take(forward=False, stage=n, microbatch=m)
        with self.span("backward-compute", action):
            dx = stage.backward(m, dy, defer_wgrads=action.op is Op.I)
        if dx is not None:
            self.mail.put(dx, forward=False, stage=n - 1, microbatch=m)
