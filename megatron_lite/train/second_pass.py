"""A pass of its own through a step's schedule: another objective over the same micro batches and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from megatron_lite.engines.base import Engine
from megatron_lite.train.health.guards import StepNumbers
from megatron_lite.train.objectives.base import Objective


class Used(NamedTuple):
    """What came of a pass: numbers to log, and what a user should be warned of."""

    numbers: Mapping[str, float] = {}
    warning: str = ""


def _nothing(engine: Engine) -> dict[str, Tensor]:
    """Default: nothing is measured."""
    return {}


def _all(microbatches: int) -> int:
    """Default: it reads what the step reads."""
    return microbatches


@dataclass(frozen=True, slots=True)
class SecondPass:
    """A second forward and backward before those of every `every`-th step, the first included.

    objective: made for the step after so many.
    use: is given the engine, which then holds the gradients of this objective's mean loss, reduced
    and unscaled, what was measured over the world, and the objective's weight: what the mean is over.
    Every rank calls it.  The gradients are cleared afterwards, so that the step itself is what it
    would be without.
    measure: called behind such a step's update; scalars on the device, equal on all ranks.
    name: stands before its metrics' names, as in `hessian/loss`.
    `microbatches` of a step's so many are how many it reads: the first ones.
    """

    name: str
    objective: Callable[[int], Objective]
    every: int
    use: Callable[[Engine, StepNumbers, float], Used]
    measure: Callable[[Engine], Mapping[str, Tensor]] = field(default=_nothing)

    microbatches: Callable[[int], int] = _all

    def is_due(self, step: int) -> bool:
        """Whether it belongs to the step that follows so many."""
        return step % self.every == 0
