"""What one rank did from when to when, for a few steps on request: the events of a timeline.

Nothing is kept, and no clock is read, unless `recording`.  A span is a block of the rank's own
program; open() is for what runs on beside it, such as a collective, and ends in another thread.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from megatron_lite.blueprint.timeline import Event


class Clock(Protocol):
    """Marks now cheaply and says later what time it was."""

    def mark(self) -> object:
        """Now."""
        ...

    def seconds(self, mark: object) -> float:
        """The mark in seconds of the host's monotonic clock, which all processes of a machine share."""
        ...


class HostClock:
    """For work that is done when the call returns."""

    def mark(self) -> object:
        """Now."""
        return time.monotonic_ns()

    def seconds(self, mark: object) -> float:
        """Since the machine started."""
        assert isinstance(mark, int)
        return mark / 1e9


@dataclass(slots=True, eq=False)
class _Kept:
    lane: str
    kind: str
    name: str
    chunk: int
    start: object
    end: object = None


class Recorder:
    """Events by lane between begin() and take()."""

    def __init__(self) -> None:
        self.recording = False
        self._clock: Clock = HostClock()
        self._kept: list[_Kept] = []

    def begin(self, clock: Clock | None = None) -> None:
        """From now on keep what happens, by this clock."""
        self._clock, self._kept, self.recording = clock or HostClock(), [], True

    @contextlib.contextmanager
    def span(self, lane: str, kind: str, name: str, *, chunk: int = 0) -> Iterator[None]:
        """The block as one event."""
        if not self.recording:
            yield
            return
        end = self.open(lane, kind, name, chunk=chunk)
        try:
            yield
        finally:
            end()

    def open(self, lane: str, kind: str, name: str, *, chunk: int = 0) -> Callable[[], None]:
        """An event that begins now; call what is returned, from whatever thread, when it ends."""
        clock = self._clock
        kept = _Kept(lane, kind, name, chunk, clock.mark())
        self._kept.append(kept)

        def end() -> None:
            kept.end = clock.mark()

        return end

    def take(self) -> dict[str, list[Event]]:
        """Lane -> events in order of their begin, in the clock's seconds; keeps nothing from now on.

        What is still in flight ends now.
        """
        self.recording = False
        clock, now = self._clock, self._clock.mark()
        lanes: dict[str, list[Event]] = {}
        for kept in self._kept:
            start, end = clock.seconds(kept.start), clock.seconds(kept.end or now)
            event = Event(start, max(start, end), kept.kind, kept.name, kept.chunk)
            lanes.setdefault(kept.lane, []).append(event)
        self._kept = []
        return {lane: sorted(events) for lane, events in lanes.items()}
