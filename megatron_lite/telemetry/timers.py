"""Named spans on the host: where the time of a step goes, printed as Megatron prints it.

A span reads the host's clock and nothing else.  Work on a device runs on behind it, so a span
around asynchronous work is only meaningful with a `wait` that waits for the device; spans of level
1 and above call it on both sides, and none of them runs at the default level 0.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from megatron_lite.telemetry.record import TimingRecord

NAME_WIDTH = 48

WAITS_FROM = 1
"""Spans of this level and above wait for the device."""

TimingOption = Literal["max", "minmax", "all"]


def no_wait() -> None:
    """For the CPU, where work is done when the call returns."""


class Timers:
    """Sums of seconds by name; spans above `level` cost one comparison and are not measured."""

    def __init__(
        self,
        level: int,
        *,
        wait: Callable[[], None] = no_wait,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.level = level
        self._wait = wait
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def span(self, name: str, *, level: int) -> Iterator[None]:
        """Add the time of the block to `name`; waits for the device if 1 <= level <= self.level."""
        if level > self.level:
            yield
            return
        start = self._now(level)
        try:
            yield
        finally:
            passed = self._now(level) - start
            self._seconds[name] = self._seconds.get(name, 0.0) + passed

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call, in the order the names first came."""
        taken, self._seconds = self._seconds, {}
        return taken

    def _now(self, level: int) -> float:
        if level >= WAITS_FROM:
            self._wait()
        return self._clock()


def timing_record(
    gathered: Sequence[Mapping[str, float]], *, iteration: int, samples: int, iterations: int
) -> TimingRecord:
    """Least and most seconds per iteration of every name over the ranks that have it."""
    names = list(dict.fromkeys(name for times in gathered for name in times))
    values = {
        name: [times[name] / iterations for times in gathered if name in times] for name in names
    }
    return TimingRecord(
        iteration=iteration,
        samples=samples,
        smallest={name: min(of_ranks) for name, of_ranks in values.items()},
        largest={name: max(of_ranks) for name, of_ranks in values.items()},
        timestamp=time.time(),
    )


def format_times(
    gathered: Sequence[Mapping[str, float]], *, option: TimingOption, iterations: int = 1
) -> str:
    """Milliseconds per iteration of every name over the ranks, in Megatron's form.

    gathered: one mapping of seconds per rank; a rank without a name (another pipeline stage) does
    not count for it.  Empty where nothing was measured.
    """
    names = list(dict.fromkeys(name for times in gathered for name in times))
    if not names:
        return ""
    scale = 1000.0 / iterations
    lines = [
        {
            "minmax": "(min, max) time across ranks (ms):",
            "max": "max time across ranks (ms):",
            "all": "times across ranks (ms):",
        }[option]
    ]
    for name in names:
        by_rank = {
            rank: times[name] * scale for rank, times in enumerate(gathered) if name in times
        }
        low, high = min(by_rank.values()), max(by_rank.values())
        label = f"{name} ".ljust(NAME_WIDTH, ".")
        if option == "minmax":
            lines.append(f"    {label}: ({low:.2f}, {high:.2f})")
        elif option == "max":
            lines.append(f"    {label}: {high:.2f}")
        else:
            lines.append(f"  {name}:")
            lines += [f"     rank {rank:2d}: {value:.2f}" for rank, value in by_rank.items()]
    return "\n".join(lines)
