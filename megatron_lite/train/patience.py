"""Work of one rank that the others wait for: reported while it lasts, never cut short by a timeout."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_lite.rendezvous.detector import place_of, work_of

TELL_SECONDS = 30.0


@dataclass(slots=True)
class Verified:
    """How far the verification of a checkpoint is on this rank; tick: it got on."""

    tick: Callable[[], None]
    done: int = 0
    total: int = 0

    def seen(self, done: int, total: int) -> None:
        """Bytes that have been read, of how many."""
        self.done, self.total = done, total
        self.tick()

    def how_far(self) -> str:
        """For a line; empty before the first byte."""
        if not self.total:
            return ""
        return f", {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB verified"


@contextlib.contextmanager
def told(
    what: str, say: Callable[[str], None], how_far: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Every half minute of the block: how long it has lasted, where it is, whether it gets on.

    how_far: more of it, with a comma in front; where it changes the work gets on, too.
    """
    began, over = time.monotonic(), threading.Event()
    main = threading.get_ident()

    def tell() -> None:
        before = (work_of(main), how_far())
        while not over.wait(TELL_SECONDS):
            now = (work_of(main), how_far())
            pace = "works" if now != before else "stands still"
            before = now
            seconds = time.monotonic() - began
            say(f" > {what}: {seconds:.0f} s so far{now[1]}, {pace} in {place_of(main)[0]}")

    teller = threading.Thread(target=tell, name="patience", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
