"""The Engine protocol: what the training step asks of whoever holds gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_lite.parallel.shard import NamedSlice


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step: the gradient norm before clipping (device scalar), and whether it was skipped."""

    grad_norm: Tensor
    skipped: bool
    num_zeros: float | None = None
    params_norm: float | None = None


class Engine(Protocol):
    """Accumulates, reduces and applies gradients; owns masters and optimizer state."""

    steps: int

    @property
    def loss_scale(self) -> float:
        """Factor on the loss before backward; 1 unless fp16."""
        ...

    def accumulators(self) -> list[tuple[Tensor, Tensor]]:
        """(parameter, fp32 accumulator) pairs for layers that add their gradients themselves."""
        ...

    def ready(self, parameter: Tensor) -> None:
        """One gradient contribution of the parameter has been accumulated."""
        ...

    def arm(self, stage: int, awaited: Sequence[Tensor] | None = None) -> None:
        """The stage's last backward comes next: full buckets may be reduced from now on.

        awaited: the parameters that it will still report, each as often; all others are complete.
        None: a whole backward comes, which reports every parameter.
        """
        ...

    def step(self, *, lr: float, weight_decay: float) -> Update:
        """Finish reductions, unscale, clip, update, clear.  Collective over the grid."""
        ...

    def settle(self) -> None:
        """Return when every parameter is whole: before anybody reads them outside a forward."""
        ...

    def wait_for(self, parameters: Iterable[Tensor]) -> None:
        """Return when these parameters are whole: what a layer asks before its forward."""
        ...

    def state(self, *, owned: bool) -> Iterator[NamedSlice]:
        """Optimizer tensors as named slices (views): those this rank stands for, or all it holds."""
        ...
