"""Schedules by their name."""

from __future__ import annotations

from megatron_lite.blueprint.schedules import SCHEDULES
from megatron_lite.blueprint.schedules.actions import Schedule


def scheduled(name: str, pp: int, num_microbatches: int, chunks: int = 1) -> Schedule:
    """The lists of every rank, at the places the kind of schedule asks for."""
    kind = SCHEDULES[name]
    return kind.generate(kind.place(pp, chunks), num_microbatches)
