"""Work of one rank for which the others wait: told while it lasts, never cut short by a time-out."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from megatron_lite.parallel.watch import place_of, work_of

TELL_SECONDS = 30.0


@contextlib.contextmanager
def told(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Every half minute of the block: how long it has lasted, where it is, whether it gets on."""
    began, over = time.monotonic(), threading.Event()
    main = threading.get_ident()

    def tell() -> None:
        before = work_of(main)
        while not over.wait(TELL_SECONDS):
            now = work_of(main)
            pace = "works" if now > before else "stands still"
            before = now
            seconds = time.monotonic() - began
            say(f" > {what}: {seconds:.0f} s so far, {pace} in {place_of(main)[0]}")

    teller = threading.Thread(target=tell, name="patience", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
