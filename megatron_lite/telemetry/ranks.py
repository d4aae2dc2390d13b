"""One value per rank, and the ranks that stand out: the straggler and memory reports."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Literal

from megatron_lite.telemetry.record import RanksRecord

SLOW = 1.2
"""Own time of a rank over the median from which it is named as a straggler."""


def ranks_record(
    what: Literal["own time", "memory"],
    values: Sequence[float],
    *,
    iteration: int,
    samples: int,
    count: int,
) -> RanksRecord:
    """The median of the ranks' values (seconds or bytes), and the `count` largest and smallest.

    The low median: of two ranks it is the smaller one, so that the larger can stand out.
    """
    order = sorted(range(len(values)), key=lambda rank: (-values[rank], rank))
    return RanksRecord(
        what=what,
        iteration=iteration,
        samples=samples,
        median=statistics.median_low(values),
        most={str(rank): values[rank] for rank in order[:count]},
        least={str(rank): values[rank] for rank in order[::-1][:count]},
        ranks=len(values),
        timestamp=time.time(),
    )


def slow_ranks(record: RanksRecord) -> dict[str, float]:
    """Stragglers: rank -> its own time over the median."""
    return {r: v / record.median for r, v in record.most.items() if v > SLOW * record.median > 0}


def format_ranks(record: RanksRecord) -> str:
    """` own time per iteration of 4 ranks (ms) | median ... | most: rank 1 ... | least: rank 0 ... |`."""
    own = record.what == "own time"
    scale = 1000.0 if own else 1.0 / 2**20
    title = (
        "own time per iteration, without waiting for others,"
        if own
        else "most memory held at once by each"
    )
    unit = "ms" if own else "MB"

    def listed(values: dict[str, float]) -> str:
        return ", ".join(f"rank {rank} {value * scale:.2f}" for rank, value in values.items())

    line = (
        f" {title} of {record.ranks} ranks ({unit}) | median: {record.median * scale:.2f}"
        f" | most: {listed(record.most)} | least: {listed(record.least)} |"
    )
    slow = slow_ranks(record)
    if own and slow:
        named = ", ".join(f"rank {rank} ({factor:.2f} x)" for rank, factor in slow.items())
        line += f"\n straggler: {named} the median: all others wait for it in every step"
    return line
