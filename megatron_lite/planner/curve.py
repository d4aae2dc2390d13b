"""The learning rate and the batch size along a run, at the points where they change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_lite.blueprint.draw_up import Blueprint

_PHASES_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Point:
    """One moment of a run: before `iteration`."""

    iteration: int
    samples: int
    tokens: int
    global_batch_size: int
    lr: float


def run_curve(
    blueprint: Blueprint,
    lr_at: Callable[[int], float],
    *,
    bends: Iterable[float] = (),
    points: int = 13,
) -> tuple[Point, ...]:
    """Start, batch changes, the learning rate's bends (in samples), end, and even steps between.

    lr_at: learning rate after so many samples.  Empty for a run of unknown length.
    """
    batches, length = blueprint.batch_schedule, blueprint.train_iters
    if length is None:
        return ()
    phases = [phase.iteration for phase in batches.phases()]
    if len(phases) > _PHASES_SHOWN:
        phases = [*phases[:3], phases[-1]]
    marks = {0, length, *(i for i in phases if i <= length)}
    marks |= {min(batches.iterations_within(math.ceil(bend)), length) for bend in bends}
    marks |= {length * k // (points - 1) for k in range(points)}
    found = []
    for iteration in sorted(marks):
        samples = batches.samples_after(iteration)
        tokens = samples * blueprint.model.seq_length
        size = batches.global_batch_size(samples)
        found.append(Point(iteration, samples, tokens, size, lr_at(samples)))
    return tuple(found)
