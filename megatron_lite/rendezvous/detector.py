"""Which rank is lost or hangs, judged from the heartbeats seen; no store, no thread, its own clock."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import FrameType

_IO = Path("/proc/self/io")

MISSED_BEATS = 5
"""Own heartbeats without one of another rank, after a failed collective, before that rank is named."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds: between heartbeats, until a silent rank is lost (before its first step: start), until a hang.

    stall: own pause after which the others' silence proves nothing.
    """

    interval: float
    stale: float
    start: float

    @classmethod
    def from_timeout(cls, seconds: float) -> Limits:
        """From --distributed-timeout-minutes; a minute of silence is enough once a run steps."""
        stale = min(seconds, 60.0)
        return cls(min(1.0, stale / 20.0), stale, seconds)

    @property
    def grace(self) -> float:
        """Time for the main thread to find the words itself."""
        return MISSED_BEATS * self.interval + 0.5

    @property
    def stall(self) -> float:
        """A heartbeat loop that paused this long was asleep itself."""
        return max(4 * self.interval, 2.0)


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat: phase is start, train, failed (a collective) or ended.

    work: grows with the processor time and the bytes read or written of a rank that prepares
    something while others wait: one call that builds an index for minutes is no hang.
    """

    count: int
    phase: str = "start"
    step: int | None = None
    ticks: int = 0
    place: str = "?"
    waits: bool = False
    work: int = 0

    def to_bytes(self) -> str:
        """As JSON."""
        return json.dumps(list(astuple(self)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Beat:
        """From JSON."""
        return cls(*json.loads(bytes(data)))


WAITING_IN = (
    "torch/distributed/", "megatron_lite/rendezvous/", "megatron_lite/parallel/",
    "megatron_lite/pipeline/mail.py", "megatron_lite/engines/",
    "megatron_lite/train/step.py", "megatron_lite/train/loop.py",
)  # fmt: skip
"""Files whose innermost call waits for other ranks or for the device, if it stays for minutes."""


def place_of(thread: int | None) -> tuple[str, bool]:
    """(the thread's innermost line in this package, whether it waits for others there)."""
    frame: FrameType | None = sys._current_frames().get(thread or -1)
    innermost = frame
    while frame is not None and "megatron_lite/" not in _file(frame):
        frame = frame.f_back
    if innermost is None or frame is None:
        return "?", False
    waits = any(part in _file(innermost) for part in WAITING_IN)
    name = _file(frame).rpartition("megatron_lite/")[2]
    return f"megatron_lite/{name}:{frame.f_lineno} {frame.f_code.co_name}", waits


def work_of(thread: int | None) -> int:
    """Tenths of a second the thread has computed, and megabytes the process has read or written."""
    tenths = megabytes = 0
    with contextlib.suppress(OSError, AttributeError):  # another system; a thread that has ended
        tenths = int(10 * time.clock_gettime(time.pthread_getcpuclockid(thread or 0)))
    with contextlib.suppress(OSError, ValueError):
        counted = dict(line.split(": ") for line in _IO.read_text().splitlines())
        megabytes = sum(int(counted[name]) for name in ("read_bytes", "write_bytes")) >> 20
    return tenths + megabytes


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename.replace("\\", "/")


@dataclass(slots=True)
class _Seen:
    """A rank's last heartbeat, when it came, since when it is unchanged, own heartbeats since."""

    beat: Beat
    came: float
    same_since: float
    missed: int = 0


@dataclass(slots=True)
class FailureDetector:
    """Heartbeats as one rank sees them.

    A rank is *lost* when no heartbeat of it came for too long, and *hangs* when it sends them, does not move
    and does not wait for others while others wait for it.
    """

    me: int
    limits: Limits
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _failing_beats: int = 0

    def see(self, rank: int, beat: Beat, now: float) -> None:
        """Take note of what the store holds of a rank; call it once per own heartbeat."""
        old = self._seen.get(rank)
        if old is None:
            self._seen[rank] = _Seen(beat, now, now)
            return
        moved = replace(beat, count=old.beat.count) != old.beat
        fresh = beat.count != old.beat.count
        self._seen[rank] = _Seen(
            beat,
            now if fresh else old.came,
            now if moved else old.same_since,
            0 if fresh else old.missed + 1,
        )

    def reset_after_own_stall(self, now: float) -> None:
        """Count all silences from now: this process slept itself.  Missed heartbeats count own ones: kept."""
        for seen in self._seen.values():
            seen.came = seen.same_since = now

    def verdict(self, now: float) -> str | None:
        """Who is lost or hangs while nothing has failed yet; None as long as all is well."""
        # a step is collective: once one rank has finished it, none is at its start any more, also one
        # that was killed before it could say so
        begun = any(seen.beat.step is not None for seen in self._seen.values())
        limit = self.limits.stale if begun else self.limits.start
        lost = [rank for rank, seen in self._others() if now - seen.came > limit]
        return self._lost(lost, now) or self._hanging(now)

    def blame(self, now: float) -> str | None:
        """Who is to blame for a failed collective; None until the heartbeats say so."""
        self._failing_beats += 1
        lost = [rank for rank, seen in self._others() if seen.missed >= MISSED_BEATS]
        if lost:
            return self._lost(lost, now)
        if self._failing_beats <= MISSED_BEATS + 2:
            return None
        busy = [
            rank
            for rank, seen in self._others()
            if seen.beat.phase in ("start", "train") and not seen.beat.waits
        ]
        if busy:
            return self._hangs(busy)
        ended = [rank for rank, seen in self._seen.items() if seen.beat.phase == "ended"]
        if ended:
            return (
                f"{_names(ended)} ended before the others were done - "
                f"last finished step {self._step()} - look for what it printed last"
            )
        if self._failing_beats <= 4 * MISSED_BEATS:
            return None
        places = "; ".join(f"rank {r} in {s.beat.place}" for r, s in list(self._seen.items())[:8])
        return (
            f"a collective failed though every rank is alive - {places} - ranks that are at "
            "different places wait for each other: report it with these lines"
        )

    def all_gone(self, now: float, *, silence: float) -> bool:
        """Whether no rank needs the store any more: all others said goodbye or are silent that long."""
        return all(
            seen.beat.phase == "ended" or now - seen.came > silence
            for rank, seen in self._seen.items()
            if rank != self.me
        )

    def _others(self) -> list[tuple[int, _Seen]]:
        """Ranks that should be alive."""
        return [
            (rank, seen)
            for rank, seen in sorted(self._seen.items())
            if rank != self.me and seen.beat.phase != "ended"
        ]

    def _hanging(self, now: float) -> str | None:
        living = [(r, s) for r, s in self._seen.items() if s.beat.phase != "ended"]
        moves = any(now - seen.same_since <= self.limits.start for _, seen in living)
        busy = [rank for rank, seen in living if not seen.beat.waits]
        if moves or not busy or len(busy) == len(living):
            return None
        return self._hangs(busy)

    def _lost(self, ranks: list[int], now: float) -> str | None:
        if not ranks:
            return None
        silent = max(now - self._seen[rank].came for rank in ranks)
        place = self._seen[ranks[0]].beat.place
        return (
            f"{_names(ranks)} {'was' if len(ranks) == 1 else 'were'} lost: no sign of life for "
            f"{silent:.1f} s - last finished step {self._step()}, last seen in {place} - look at its "
            "last lines and its node: killed, out of memory, stopped, or cut off?"
        )

    def _hangs(self, ranks: list[int]) -> str:
        places = "; ".join(f"rank {rank} in {self._seen[rank].beat.place}" for rank in ranks[:8])
        verb = "hangs" if len(ranks) == 1 else "hang"
        return (
            f"{_names(ranks)} {verb} while the others wait in a collective - last finished step "
            f"{self._step()}, {places} - look at what it does there, or raise "
            "--distributed-timeout-minutes if it only needs longer"
        )

    def _step(self) -> str:
        """The last step any rank finished: a step is collective, so all have or nearly have."""
        steps = [s.beat.step for s in self._seen.values() if s.beat.step is not None]
        return str(max(steps)) if steps else "none"


def _names(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (" ..." if len(ranks) > 16 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
