"""The Engine protocol: what the training step needs from the owner of gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from megatron_lite.blueprint.turns import BlockDraw
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.engines.loss_scale import LossScale
from megatron_lite.parallel.carrier import Carrier
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.layer_hooks import LayerHooks
from megatron_lite.parallel.shard import LocalParameter, NamedSlice


@dataclass(frozen=True, slots=True)
class SquaredNorm:
    """share: this rank's contribution to the squared gradient norm, fp64 scalar; finite: bool [n].

    A replicated gradient is counted by one rank; finite looks at every gradient this rank holds, in
    the order of gradients(owned=False).
    """

    share: Tensor
    finite: Tensor


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step: the gradient norm before clipping, and whether the step was skipped.

    All its numbers are scalars on the device.
    """

    grad_norm: Tensor
    skipped: bool
    num_zeros: Tensor | None = None
    params_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """What an update measures on request."""

    num_zeros: bool = False
    params_norm: bool = False


@dataclass(frozen=True, slots=True)
class EngineProgress:
    """An engine's state in a checkpoint besides tensors."""

    steps: int
    loss_scale: dict[str, float] = field(default_factory=dict)


class Engine(Carrier, Protocol):
    """Accumulates, reduces and applies gradients; owns weights, masters and optimizer state.

    Code outside engines/ uses no more of an engine than these names.
    """

    scaler: LossScale

    @property
    def loss_scale(self) -> float:
        """Factor on the loss before backward; 1 unless fp16."""
        ...

    def fill(self, write: Callable[[list[NamedSlice]], None], *, masters: bool = False) -> None:
        """Have the weights this rank holds written in place, and their masters follow.

        masters: they are handed over and written, too (`master.<name>`).
        """
        ...

    def accumulators(self) -> list[tuple[Tensor, Tensor]]:
        """(parameter, fp32 accumulator) pairs for layers that add their gradients themselves."""
        ...

    def ready(self, parameter: Tensor) -> None:
        """One gradient contribution of the parameter has been accumulated."""
        ...

    def begin_last_backward(
        self, stage: int, pending_wgrads: Sequence[Tensor] | None = None
    ) -> None:
        """From here gradients of this stage are final: a full bucket may be reduced.

        pending_wgrads: the weights whose deferred gradients are still to come, each as often as it
        will be reported; all others are complete.  None: a whole backward comes, which reports all.
        """
        ...

    def reduce(self) -> None:
        """Finish reductions and unscale: accumulators hold the gradient of the mean loss.  Collective."""
        ...

    def unreduced(self) -> AbstractContextManager[None]:
        """Within, no reduction starts: accumulators hold what this rank alone has added to them."""
        ...

    def squared_norm(self) -> SquaredNorm:
        """This rank's share of the gradient's squared norm; the sum over the world is the whole."""
        ...

    @property
    def waits_because(self) -> str:
        """Why apply() cannot be given `taken`, in a few words; "" where it can."""
        ...

    def apply(
        self,
        norm: Tensor,
        *,
        lr: float,
        weight_decay: float,
        decoupled_lr: float | None = None,
        taken: Tensor | None = None,
    ) -> Update:
        """Clip by the global norm, update, clear the accumulators.  Collective over the grid.

        decoupled_lr: of the tensors with a row for each token, where it is another.
        taken: bool scalar on the device, equal on all ranks: where it is false, weights and state
        stay as they are, and take_back() follows as soon as the host knows.
        """
        ...

    def take_back(self) -> None:
        """The last apply() was not taken: it does not count among the updates."""
        ...

    def discard(self, norm: Tensor) -> Update:
        """Clear the accumulators: the step is skipped, weights and state stay as they are."""
        ...

    def layer_hooks(self, parameters: Sequence[Tensor]) -> LayerHooks | None:
        """What to call around the layer (embedding, block, head) that reads these; None: nothing."""
        ...

    def wait_for_param_gather(self) -> None:
        """Block until all-gathered parameters are complete: before they are read outside a forward."""
        ...

    def wait_for(self, parameters: Iterable[Tensor]) -> None:
        """Wait until these parameters are all-gathered: called before a layer's forward."""
        ...

    def weights(self, *, owned: bool) -> Iterator[NamedSlice]:
        """The model's tensors as named slices (views): this rank's primary copies, or all it holds.

        Waits for the parameter gather first.
        """
        ...

    def gradients(self, *, owned: bool) -> Iterator[NamedSlice]:
        """The accumulators this rank updates from, likewise; before reduce() its own sums."""
        ...

    def state(self, *, owned: bool) -> Iterator[NamedSlice]:
        """Masters (`master.<name>`) and optimizer tensors (`<state>.<name>`), likewise."""
        ...

    def progress(self) -> EngineProgress:
        """Updates done and the loss scale's state, for a checkpoint."""
        ...

    def resume(self, progress: EngineProgress) -> None:
        """Stand where a checkpoint was saved, with the states that there are then, to be filled.

        A loss scale that it does not say stays.
        """
        ...


class MakeEngine(Protocol):
    """How every engine is made; makes no collective call.

    One with `gives_memory` true is handed parameters without memory where --zero-stage is 3.
    """

    def __call__(
        self,
        stages: Mapping[int, Sequence[LocalParameter]],
        ctx: ParallelContext,
        *,
        optim: OptimConfig,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        statistics: Statistics,
        draw: BlockDraw | None,
        span: Callable[[str], AbstractContextManager[object]],
    ) -> Engine:
        """An engine over the parameters of this rank's stages; span measures its phases.

        draw: which blocks are trained when, where not all of them always are.
        """
        ...
