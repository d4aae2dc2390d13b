"""Layers -> stages -> pp ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Placement = tuple[int, ...]
"""placement[stage] is the pp rank that holds the stage."""


@dataclass(frozen=True, slots=True)
class StageLayers:
    """A run of layers that one pp rank computes in one go; layers carry their global numbers."""

    index: int
    layers: tuple[int, ...]
    has_embedding: bool
    has_head: bool


def round_robin(pp: int, num_chunks: int = 1) -> Placement:
    """Chunk c of pp rank r holds stage c * pp + r."""
    return tuple(range(pp)) * num_chunks


def folded(pp: int, num_chunks: int = 2) -> Placement:
    """There and back: 0, 1, ..., pp - 1, pp - 1, ..., 1, 0; the ends meet on one rank."""
    there = tuple(range(pp))
    return (*there, *there[::-1]) * (num_chunks // 2)


def cut_stages(counts: Sequence[int]) -> tuple[StageLayers, ...]:
    """Stages of so many layers each; the embedding before the first, the head after the last."""
    stages, start = [], 0
    for index, count in enumerate(counts):
        stages.append(
            StageLayers(
                index=index,
                layers=tuple(range(start, start + count)),
                has_embedding=index == 0,
                has_head=index == len(counts) - 1,
            )
        )
        start += count
    return tuple(stages)
