"""Run, the third noun: a Blueprint made real in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.blueprint.schedules.actions import Action
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.data.batch import Batch
from megatron_lite.engines.base import Engine
from megatron_lite.layers.contexts import StageContext
from megatron_lite.models.packing import Packed
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import LocalParameter, NamedSlice
from megatron_lite.pipeline.executor import Executor
from megatron_lite.train.health.guards import Guards
from megatron_lite.train.measuring.timing import RunTimers
from megatron_lite.train.objectives.base import Objective
from megatron_lite.train.second_pass import SecondPass


def _nothing() -> None:
    """Default: no callback."""


@dataclass(slots=True)
class Run:
    """The Blueprint made real on this rank: what one training step needs.

    parameters: this rank's, stage by stage; packed: what it keeps in 4 bits beside them.
    progress: the only part that changes by itself.
    late_gradients: makes those that are made of all backwards of a step; before_reduce: called when
    all gradients of this rank are there.  second_passes: through the same
    schedule with other objectives, in some steps.
    runs_ahead: whether the host enqueues a step before it has heard of the one before (train/ahead.py);
    waits_because: why it does not, on a device where it could.
    """

    blueprint: Blueprint
    ctx: ParallelContext
    context: StageContext
    objective: Objective
    pipeline: Executor
    engine: Engine
    parameters: list[LocalParameter]
    packed: list[Packed] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    timers: RunTimers = field(default_factory=lambda: RunTimers(level=0))
    guards: Guards = field(default_factory=Guards)
    late_gradients: Callable[[], None] = _nothing
    before_reduce: Callable[[], None] = _nothing
    second_passes: list[SecondPass] = field(default_factory=list)
    runs_ahead: bool = False
    waits_because: tuple[str, ...] = ()

    @property
    def adapters(self) -> frozenset[str]:
        """The tensors that are trained beside a frozen model; none where the model itself is trained."""
        specs = self.blueprint.parameters
        frozen = any(spec.tensor.frozen for spec in specs)
        return frozenset(s.name for s in specs if frozen and not s.tensor.frozen)

    def bits(self) -> Iterator[NamedSlice]:
        """What is packed, by name."""
        for one in self.packed:
            yield from one.bits()

    def actions(self, num_microbatches: int) -> Sequence[Sequence[Action]]:
        """This rank's lowered actions of a training step."""
        return self.blueprint.actions(num_microbatches)[self.ctx.pp.rank]

    def forward_actions(self, num_microbatches: int) -> Sequence[Sequence[Action]]:
        """This rank's lowered actions of an evaluation step."""
        return self.blueprint.forward_actions(num_microbatches)[self.ctx.pp.rank]

    def expect_messages(self, batch: Batch) -> None:
        """Tell the mail the form of this step's activations: [s/tp, b, h]."""
        samples, tokens = batch.tokens.shape
        split = self.context.tp.size if self.context.sequence_parallel else 1
        self.pipeline.mail.expect(
            ((tokens - 1) // split, samples, self.context.model.hidden_size),
            self.context.dtype,
            self.ctx.device,
        )
