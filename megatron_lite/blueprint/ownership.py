"""Which replica keeps which rows of the optimizer state.

Rows of every canonical tensor are cut into equal blocks, one per rank, so that each shard is a
named slice of a named tensor and any layout can read it.  Rules that need whole matrices own whole
tensors instead, the largest first onto the least loaded rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Rows(NamedTuple):
    """Rows [start, stop) of a tensor; empty where start == stop."""

    start: int
    stop: int


def rows_per_rank(rows: int, ranks: int) -> int:
    """Rows of one block: the last blocks may be short or empty."""
    return -(-rows // ranks)


def cut_rows(rows: int, ranks: int) -> tuple[Rows, ...]:
    """One block per rank, in order; together all rows, each once."""
    block = rows_per_rank(rows, ranks)
    return tuple(Rows(min(k * block, rows), min((k + 1) * block, rows)) for k in range(ranks))


def whole_owners(
    costs: Sequence[float], ranks: int, loads: list[float] | None = None
) -> tuple[int, ...]:
    """The owner of each tensor by the cost of its update; deterministic.

    loads: what each rank has already; what it is given here is added.
    """
    loads = [0.0] * ranks if loads is None else loads
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        owners[index] = rank
        loads[rank] = load + costs[index]
        heapq.heappush(heap, (loads[rank], rank))
    return tuple(owners)


def balance(elements_per_rank: Sequence[int]) -> float:
    """Largest share over the mean share: 1.0 is even."""
    mean = sum(elements_per_rank) / len(elements_per_rank)
    return max(elements_per_rank) / mean if mean else 1.0
