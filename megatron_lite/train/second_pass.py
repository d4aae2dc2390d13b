"""A pass of its own through a step's schedule: another objective over the same micro batches and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_lite.engines.base import Engine
from megatron_lite.train.health.guards import StepNumbers
from megatron_lite.train.objectives.base import Objective


@dataclass(frozen=True, slots=True)
class SecondPass:
    """A second forward and backward before those of every `every`-th step, the first included.

    use: is given the engine, which then holds the gradients of this objective's mean loss, reduced
    and unscaled, and what was measured over the world; returns numbers to log.  Every rank calls
    it.  The gradients are cleared afterwards, so that the step itself is what it would be without.
    name: stands before its metrics' names, as in `hessian/loss`.
    """

    name: str
    objective: Objective
    every: int
    use: Callable[[Engine, StepNumbers], Mapping[str, float]]

    def is_due(self, step: int) -> bool:
        """Whether it belongs to the step that follows so many."""
        return step % self.every == 0
