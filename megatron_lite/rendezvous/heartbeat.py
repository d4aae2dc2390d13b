"""Heartbeats: every rank writes one to the rendezvous store, and a rank whose heartbeats stop is named.

    rank r   ── heartbeat: count, step, where ──▶  store  ◀── rank 0 reads all heartbeats, the others
    (thread)                                         │        rank 0's; the first to see a rank lost
                                                  verdict     writes the verdict, once
                                                     │
    every rank reads the verdict: FATAL[6] names the lost rank, also where the main thread is stuck

No collective, no device work: two sleeping threads and a few hundred bytes per rank and second.
detector.py judges; this file talks to the store.  A rank that fails by itself leaves its FATAL line as
the verdict, a rank that ends says so, and neither is then taken for lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

from torch.distributed import Store  # type: ignore[attr-defined]

from megatron_lite.rendezvous.detector import Beat, FailureDetector, Limits, place_of, work_of

NO_VERDICT = b"-"
ANSWER_SECONDS = 2.0


class Presence(Protocol):
    """A run's heartbeat and last words; Alone in a world of one process."""

    step: int | None

    def reached(self, step: int) -> None:
        """The step is finished."""
        ...

    def tick(self) -> None:
        """Progress other than a step: an evaluation batch, a part of a save."""
        ...

    def explain(self, what: str) -> str:
        """Which rank was lost, after a collective failed with the text `what`."""
        ...

    def says_first(self, text: str) -> bool:
        """Whether no other rank of this host has said the same or is about to."""
        ...

    def leave(self, last_words: str | None = None) -> None:
        """Say goodbye, with the FATAL line where there is one."""
        ...


class Alone:
    """A world of one process: only the last finished step is kept."""

    def __init__(self) -> None:
        self.step: int | None = None

    def reached(self, step: int) -> None:
        """The step is finished."""
        self.step = step

    def tick(self) -> None:
        """No other rank waits for a heartbeat."""

    def explain(self, what: str) -> str:
        """There is no other rank to name."""
        return what

    def says_first(self, text: str) -> bool:
        """There is no other rank on this host."""
        return True

    def leave(self, last_words: str | None = None) -> None:
        """There is no other rank to tell."""


class Liveness:
    """Sends this rank's heartbeats and reads those of the others, in two daemon threads.

    store: a connection of its own, because a call may block as long as the store is silent.
    hosts_store: this process holds the store, so it leaves last.  beside_store: a launcher on this
    host does, which goes as soon as its ranks fail.
    end: called in a thread with the verdict when the main thread does not end by itself.
    """

    def __init__(
        self,
        store: Store,
        *,
        prefix: str,
        rank: int,
        world_size: int,
        limits: Limits,
        hosts_store: bool,
        beside_store: bool,
        holder: str,
        end: Callable[[str], None],
    ) -> None:
        self.step: int | None = None
        self._store, self._prefix = store, prefix
        self._rank, self._world_size = rank, world_size
        self._limits, self._holder, self._end = limits, holder, end
        self._hosts_store, self._beside_store = hosts_store, beside_store
        self._watch = FailureDetector(rank, limits)
        self._main = threading.main_thread().ident
        self._ticks = self._count = 0
        self._phase = "start"
        self._verdict: str | None = None
        self._last_words: str | None = None
        self._answered = time.monotonic()
        self._wake, self._left = threading.Event(), threading.Event()
        self._talker = threading.Thread(target=self._talk, name="liveness-beat", daemon=True)
        self._judge = threading.Thread(target=self._listen, name="liveness-judge", daemon=True)

    def announce(self) -> None:
        """The first heartbeat; every rank must have sent it before any starts."""
        self._store.set(self._key("beat", self._rank), self._beat().to_bytes())
        self._store.compare_set(self._key("verdict"), "", NO_VERDICT.decode())

    def start(self) -> None:
        """Start the two threads."""
        self._answered = time.monotonic()
        self._talker.start()
        self._judge.start()

    def reached(self, step: int) -> None:
        """The step is finished."""
        self.step = step
        self._phase = "train"

    def tick(self) -> None:
        """Progress other than a step: an evaluation batch, a part of a save."""
        self._ticks += 1

    def explain(self, what: str) -> str:
        """Which rank was lost, after a collective failed with the text `what`; waits for the answer.

        At most a few heartbeats: a living rank keeps sending them while it waits here itself.
        """
        self._phase = "failed"
        self._wake.set()
        deadline = time.monotonic() + 6 * self._limits.grace + 15.0
        while self._verdict is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._verdict or f"a collective failed and no rank is missing: {what}"

    def says_first(self, text: str) -> bool:
        """Whether no other rank of this host has said the same; True where the store gives no answer."""
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        key = self._key("said", socket.gethostname(), digest)
        told: list[int] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError, ValueError):
                told.append(self._store.add(key, 1))

        asking = threading.Thread(target=ask, name="liveness-words", daemon=True)
        asking.start()
        asking.join(ANSWER_SECONDS)  # a rank that fails must not hang while it says so
        return told in ([], [1])

    def leave(self, last_words: str | None = None) -> None:
        """Say goodbye, with the FATAL line where there is one; the store's host waits for the others."""
        self._last_words = last_words
        self._phase = "ended"
        self._wake.set()
        if self._talker.is_alive():
            self._left.wait(self._patience() + 2 * self._limits.grace)
        self._left.set()

    # -- the thread that talks to the store -------------------------------------------------

    def _talk(self) -> None:
        try:
            while self._phase != "ended":
                self._exchange()
                self._wake.wait(self._limits.interval)
                self._wake.clear()
            self._say_goodbye()
        except (RuntimeError, ValueError) as error:  # the store is gone, not only silent
            if self._verdict is None:
                self._verdict = (
                    f"{self._holder} was lost: the connection to the store broke "
                    f"({str(error).splitlines()[0][:120]}) - last finished step "
                    f"{_step(self.step)} - look at its last lines and its node"
                )
        finally:
            if self._phase == "ended":
                self._left.set()

    def _exchange(self) -> None:
        self._store.set(self._key("beat", self._rank), self._beat().to_bytes())
        everybody = self._rank == 0 or self._phase in ("failed", "ended")
        ranks = range(self._world_size) if everybody else range(1)
        keys = [self._key("verdict"), *(self._key("beat", rank) for rank in ranks)]
        verdict, *beats = self._store.multi_get(keys)
        now = time.monotonic()
        if now - self._answered > self._limits.stall:
            self._watch.reset_after_own_stall(
                now
            )  # this process slept: the others are not to blame
        self._answered = now
        for rank, data in zip(ranks, beats, strict=True):
            self._watch.see(rank, Beat.from_bytes(data), now)
        if bytes(verdict) != NO_VERDICT:
            self._verdict = bytes(verdict).decode()
        elif self._verdict is None:
            failed = self._phase == "failed"
            found = self._watch.blame(now) if failed else self._watch.verdict(now)
            if found is not None:
                self._verdict = self._publish(found)

    def _publish(self, text: str) -> str:
        """The first verdict stands; returns it."""
        written = self._store.compare_set(self._key("verdict"), NO_VERDICT.decode(), text)
        return bytes(written).decode()

    def _say_goodbye(self) -> None:
        if self._last_words is not None and self._verdict is None:
            self._publish(f"rank {self._rank} failed first: {self._last_words}")
        self._store.set(self._key("beat", self._rank), self._beat().to_bytes())
        deadline = time.monotonic() + self._patience()
        while time.monotonic() < deadline:
            self._exchange()
            silence = min(self._patience(), self._limits.stale)
            if self._watch.all_gone(time.monotonic(), silence=silence):
                return
            time.sleep(0.05)

    def _patience(self) -> float:
        """How long this rank waits for the others to leave, so that they can read the verdict."""
        failing = self._last_words is not None or self._verdict is not None
        if failing:
            return self._limits.grace + 1.0 if self._hosts_store or self._beside_store else 0.0
        return self._limits.stale if self._hosts_store else 0.0

    # -- the thread that ends a process whose main thread is stuck ----------------------------

    def _listen(self) -> None:
        before = time.monotonic()
        grace = self._limits.grace  # the main thread may be about to say it, or to fail with them
        while not self._left.wait(self._limits.interval):
            now = time.monotonic()
            if now - before > self._limits.stall:
                self._answered = now
            before = now
            limit = self._limits.stale if self.step is not None else self._limits.start
            if self._verdict is None and now - self._answered > limit:
                self._verdict = (
                    f"{self._holder} was lost: its store gives no answer for "
                    f"{now - self._answered:.0f} s (stopped, or its network is down) - last finished "
                    f"step {_step(self.step)} - look at its last lines and its node"
                )
                grace = self._limits.interval  # nobody else can tell it anything better
            if self._verdict is not None:
                if not self._left.wait(grace):
                    self._end(self._verdict)
                return

    def _beat(self) -> Beat:
        self._count += 1
        place, waits = place_of(self._main)
        # in a step a rank that computes for ever hangs; before it, host work has no smaller parts
        work = 0 if waits or self._phase != "start" else work_of(self._main)
        return Beat(self._count, self._phase, self.step, self._ticks, place, waits, work)

    def _key(self, *parts: object) -> str:
        return "/".join([self._prefix, *map(str, parts)])


def _step(step: int | None) -> str:
    return "none" if step is None else str(step)


def roll_call(
    store: Store,
    *,
    prefix: str,
    rank: int,
    world_size: int,
    seconds: float,
    remind: Callable[[Callable[[], list[int]]], None] = lambda missing: None,
) -> list[int]:
    """Wait until all ranks have called; returns the ranks still missing after `seconds`.

    remind: called again and again while there are some, with what finds them.  Raises ValueError
    where two processes say they are this rank.
    """
    if store.add(f"{prefix}/present/{rank}", 1) > 1:
        raise ValueError(f"two processes say they are rank {rank}")
    missing = list(range(world_size))
    end = time.monotonic() + seconds
    pause = 0.005

    def absent() -> list[int]:
        return [r for r in missing if not store.check([f"{prefix}/present/{r}"])]

    while True:
        # the first missing rank is enough to know that we are not complete
        while missing and store.check([f"{prefix}/present/{missing[0]}"]):
            missing.pop(0)
        if not missing or time.monotonic() > end:
            return absent()
        remind(absent)
        time.sleep(pause)
        pause = min(2 * pause, 0.25)


def fact_differences(
    store: Store, facts: dict[str, str], *, prefix: str, rank: int, world_size: int
) -> list[str]:
    """Lines `key: value on ranks ..., value on rank ...` where the ranks' facts differ.

    Every rank gets the same lines.  All ranks must have called in before.
    """
    text = "\n".join(f"{key}\t{value}" for key, value in sorted(facts.items()))
    store.set(f"{prefix}/facts/{rank}", text)
    texts = store.multi_get([f"{prefix}/facts/{r}" for r in range(world_size)])
    groups: dict[bytes, list[int]] = {}
    for other, data in enumerate(texts):
        groups.setdefault(bytes(data), []).append(other)
    if len(groups) == 1:
        return []
    tables = [
        (dict(line.partition("\t")[::2] for line in data.decode().split("\n")), ranks)
        for data, ranks in groups.items()
    ]
    lines = []
    for key in sorted({key for table, _ in tables for key in table}):
        held: dict[str, list[int]] = {}
        for table, ranks in tables:
            held.setdefault(table.get(key, "(absent)"), []).extend(ranks)
        if len(held) > 1:
            said = (f"{value} on {_ranks(sorted(ranks))}" for value, ranks in held.items())
            lines.append(f"{key}: {', '.join(said)}")
    return lines


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if ranks[8:] else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
