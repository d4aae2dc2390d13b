"""When a snapshot is written: at once, or by a thread while training continues.

    step ── copy to host memory ──▶ step ── step ── step ── ...      the main thread
                     └── hash, write, fsync, agree, rename ──▶ Saved     the writer

The writer of every rank makes the same calls over a group of its own, so its waiting never meets
the collectives of a step.  Whether a save failed the ranks tell each other with a step's votes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from megatron_lite.checkpoint.agreement import Agreement
from megatron_lite.checkpoint.snapshot import HostMemory, Snapshot
from megatron_lite.checkpoint.store import Keep, Saved, Store


class Saver(Protocol):
    """Both ways.  save() and wait() are collective: every rank makes the same calls."""

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a save that failed and that wait() has not yet raised."""
        ...

    def reserve(self, snapshot: Snapshot) -> None:
        """Take the memory that saves of such shapes need."""
        ...

    def save(self, snapshot: Snapshot) -> None:
        """Write the snapshot, or begin to; wait() comes first where another is still written."""
        ...

    def finished(self) -> Saved | None:
        """A save that is complete and was not reported before; does not wait."""
        ...

    def wait(self) -> None:
        """Return when nothing is being written; raises what made a save fail, once."""
        ...


@dataclass(slots=True)
class Foreground:
    """save() returns when the checkpoint is complete."""

    store: Store
    keep: Keep
    _saved: Saved | None = None

    @property
    def failed(self) -> bool:
        """save() itself raises."""
        return False

    def reserve(self, snapshot: Snapshot) -> None:
        """Tensors are written from where they lie."""

    def save(self, snapshot: Snapshot) -> None:
        """Write it."""
        self._saved = self.store.save(snapshot, self.keep)

    def finished(self) -> Saved | None:
        """The last one."""
        saved, self._saved = self._saved, None
        return saved

    def wait(self) -> None:
        """No save is ever in flight."""


@dataclass(slots=True)
class Background:
    """save() returns when the tensors are copied to host memory.

    idle: called every second that wait() lasts.  memory: holds what the writer writes.
    """

    store: Store
    keep: Keep
    idle: Callable[[], None]
    memory: HostMemory = field(default_factory=HostMemory)
    _thread: threading.Thread | None = None
    _saved: Saved | None = None
    _error: BaseException | None = None

    @classmethod
    def over(cls, store: Store, keep: Keep, idle: Callable[[], None]) -> Background:
        """With a group of its own for the writers.  Collective over the world."""
        return cls(replace(store, thread=Agreement.of_a_thread(store.ctx)), keep, idle)

    @property
    def failed(self) -> bool:
        """Whether the writer has given up."""
        return self._error is not None

    def reserve(self, snapshot: Snapshot) -> None:
        """Host memory of the snapshot's size."""
        self.memory.reserve(snapshot)

    def save(self, snapshot: Snapshot) -> None:
        """Copy and let the writer begin."""
        self.wait()
        copied = self.memory.copy(snapshot)
        # a daemon: a process that ends by a failure does not wait for it, the others do in wait()
        self._thread = threading.Thread(
            target=self._write, args=(copied,), name="checkpoint-writer", daemon=True
        )
        self._thread.start()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self._saved = self.store.save(snapshot, self.keep)
        except BaseException as error:  # the main thread raises it
            self._error = error

    def finished(self) -> Saved | None:
        """What the writer has completed."""
        saved, self._saved = self._saved, None
        return saved

    def wait(self) -> None:
        """Until the writer has ended."""
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(1.0)
                self.idle()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
