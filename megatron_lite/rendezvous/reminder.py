"""Says what a start is waiting for, while it waits."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS = 30.0
"""Between two lines."""


class Reminder:
    """Says what is waited for: after some seconds, then every 30.

    noun: what is counted, of which this is number `number` of `count`.  address: where they meet.
    silent: another one of this node says it.
    """

    def __init__(
        self,
        noun: str,
        number: int,
        count: int,
        address: str,
        seconds: float,
        *,
        after: float = 0.0,
        silent: bool = False,
    ) -> None:
        self._who = f"{noun} {number} waits at {address}"
        self._noun, self._count, self._silent = noun, count, silent
        self._end = time.monotonic() + seconds
        self._next = time.monotonic() + after

    def missing(self, find: Callable[[], list[int]]) -> None:
        """Name who is there and who is not; find is asked only when it is time."""
        if self._silent or time.monotonic() < self._next:
            return
        missing = find()
        there = [n for n in range(self._count) if n not in set(missing)]
        if missing:
            self.say(f"{self._noun}s present: {numbers(there)}; missing: {numbers(missing)}")

    def say(self, what: str) -> None:
        """Print it, with how long it may last and what to change, when it is time."""
        now = time.monotonic()
        if self._silent or now < self._next:
            return
        self._next = now + SECONDS
        print(
            f"{self._who}: {what} - for up to {max(self._end - now, 0.0):.0f} s more "
            "(--distributed-timeout-minutes); every node needs the same MASTER_ADDR, MASTER_PORT and "
            "number of nodes, and its own NODE_RANK",
            flush=True,
        )


def numbers(listed: list[int]) -> str:
    """Ascending numbers in words.

    >>> numbers([0, 2, 3, 4, 9]), numbers([])
    ('0, 2-4, 9', 'none')
    """
    runs: list[list[int]] = []
    for number in listed:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in runs]
    return (", ".join(shown[:16]) + (" ..." if shown[16:] else "")) or "none"
