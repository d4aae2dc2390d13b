"""How long this rank waits for others: the rest of a step is its own time.

A collective ends when the last rank has come, so the slowest rank is the one that waits least.
Several ranks have an observer that measures, unless --no-log-straggler.
"""

from __future__ import annotations

import time

import torch

from megatron_lite.parallel.observer import Observer


class Waits(Observer):
    """Entered around every wait; measures nothing."""

    def waiting(self, what: str = "") -> Waits:
        """This one, whatever is waited for."""
        return self

    def __enter__(self) -> None:
        """The wait begins."""

    def __exit__(self, *error: object) -> None:
        """It is over."""

    def mark(self) -> float:
        """Now, for take()."""
        return 0.0

    def take(self, until: float | None = None) -> float:
        """Seconds waited since the last call; until: up to this mark, the rest is for the next call."""
        return 0.0


class HostWaits(Waits):
    """For the CPU, where a collective returns when it is done."""

    def __init__(self) -> None:
        self._seconds = self._began = self._taken = 0.0

    def __enter__(self) -> None:
        """Read the clock."""
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        """Read it again."""
        self._seconds += time.perf_counter() - self._began

    def mark(self) -> float:
        """Seconds waited so far."""
        return self._seconds

    def take(self, until: float | None = None) -> float:
        """Seconds since the last call."""
        end = self._seconds if until is None else until
        seconds, self._taken = end - self._taken, end
        return seconds


class DeviceWaits(Waits):
    """For a GPU, where the host runs ahead and the stream waits: pairs of events around the wait."""

    def __init__(self) -> None:
        self._taken = 0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._free: list[
            tuple[torch.cuda.Event, torch.cuda.Event]
        ] = []  # making one is the dear part

    def __enter__(self) -> None:
        """An event before the wait."""
        if self._free:
            pair = self._free.pop()
        else:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        pair[0].record()
        self._pairs.append(pair)

    def __exit__(self, *error: object) -> None:
        """An event behind it."""
        self._pairs[-1][1].record()

    def mark(self) -> float:
        """Waits so far."""
        return self._taken + len(self._pairs)

    def take(self, until: float | None = None) -> float:
        """Seconds since the last call; waits until the device has come so far."""
        count = len(self._pairs) if until is None else int(until) - self._taken
        pairs, self._pairs = self._pairs[:count], self._pairs[count:]
        self._taken += len(pairs)
        if pairs:
            pairs[-1][1].synchronize()
        self._free += pairs
        return sum(before.elapsed_time(after) for before, after in pairs) / 1000.0


def measuring(device: torch.device) -> Waits:
    """The one that measures on this device."""
    return DeviceWaits() if device.type == "cuda" else HostWaits()
