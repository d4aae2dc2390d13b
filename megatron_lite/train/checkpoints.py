"""Saves a run's checkpoints and reports on them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from megatron_lite.checkpoint.agreement import Agreement
from megatron_lite.checkpoint.saver import Background, Foreground, Saver
from megatron_lite.checkpoint.snapshot import UNKNOWN, Origin, Snapshot
from megatron_lite.checkpoint.store import Keep, Store
from megatron_lite.config.errors import StorageError
from megatron_lite.config.sections.checkpoint import CheckpointConfig
from megatron_lite.rendezvous.heartbeat import Presence
from megatron_lite.storage.lock import FolderTaken
from megatron_lite.telemetry.record import SaveRecord
from megatron_lite.train.folder import RunFolder
from megatron_lite.train.measuring.log import Log
from megatron_lite.train.run import Run


@dataclass(slots=True)
class Checkpoints:
    """The checkpoints of a run; without --save there are none.

    saved_at: the step of the newest that is complete or being written.
    """

    run: Run
    config: CheckpointConfig
    log: Log
    plain_config: dict[str, Any]
    store: Store | None
    saver: Saver | None
    folder: RunFolder
    origin: Origin = UNKNOWN
    saved_at: int = field(init=False)
    _stalled_seconds: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.saved_at = self.run.progress.step

    @classmethod
    def over(
        cls,
        run: Run,
        config: CheckpointConfig,
        log: Log,
        presence: Presence,
        store: Store | None,
        folder: RunFolder,
    ) -> Checkpoints:
        """With the saver that was asked for.  Collective over the world."""
        keep = Keep(config.keep_last, config.keep_every)
        saver: Saver | None = None
        if store is not None:
            saver = (
                Background.over(store, keep, idle=presence.tick)
                if config.async_save
                else Foreground(store, keep)
            )
        return cls(run, config, log, {}, store, saver, folder)

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a save beside the training that failed, or of a lost folder."""
        lost = self.store is not None and self.folder.lost is not None
        return lost or (self.saver is not None and self.saver.failed)

    def describe(self) -> str:
        """What will be written, for the first lines of a run."""
        if self.store is None:
            return " > no checkpoints are written (--save DIR without --no-save-checkpoints)"
        every, keep = self.config.save_interval, self.config.keep_last
        often = f"every {every} iterations (--save-interval)" if every else "at the end only"
        kept = "all are kept (--keep-last N)" if keep is None else f"the newest {keep} are kept"
        return f" > checkpoints into {self.store.root}: {often}; the last step always; {kept}"

    def prepare(self) -> None:
        """Find out at the start whether a checkpoint can be saved, and take the memory for it."""
        if self.store is None or self.saver is None:
            return
        snapshot = self._snapshot(self.store)
        self.store.prepare(snapshot)
        self.saver.reserve(snapshot)

    def save(self, *, last: bool = False) -> None:
        """Write a checkpoint, or begin to (--async-save).

        last: nothing comes after it, so that a failure is never passed over.
        """
        if self.store is None or self.saver is None:
            return
        began = time.perf_counter()
        with self.run.timers.span("save-checkpoint"):
            self.wait()
            try:
                self.saver.save(self._snapshot(self.store))
                self.saved_at = self.run.progress.step
            except StorageError as error:
                self._tolerate(error, last=last)
        self._stalled_seconds = time.perf_counter() - began
        self.report_completed()

    def wait(self, *, last: bool = False) -> None:
        """Wait for the save in flight, if there is one; its failure is raised or logged."""
        if self.saver is None:
            return
        try:
            self.saver.wait()
        except StorageError as error:
            self.saved_at = 0  # so that the last step is saved whichever it is
            self._tolerate(error, last=last)
        self.report_completed()

    def confirm(self) -> None:
        """Report what happened to the run folder, if anything; once.  Collective over the world."""
        if self.store is None:
            return
        lost = self.folder.lost
        try:
            with Agreement.of_the_step(self.run.ctx).together(f"find {self.store.root}"):
                if lost is not None:
                    raise lost
        except StorageError as error:
            if self.folder.lock is not None:
                self.folder.lock.told = True
            self._tolerate(error, last=False)

    def finish(self) -> None:
        """The last step is saved and nothing is being written any more."""
        step = self.run.progress.step
        if self.saved_at != step and step > 0:
            self.save(last=True)
        self.wait(last=True)

    def report_completed(self) -> None:
        """A line and a record of a checkpoint that is complete."""
        saved = self.saver.finished() if self.saver is not None else None
        if saved is None:
            return
        record = SaveRecord(
            iteration=saved.iteration,
            bytes=saved.bytes,
            seconds=saved.seconds,
            folder=str(saved.folder.parent),
            stalled_seconds=self._stalled_seconds,
            timestamp=time.time(),
        )
        self.log.write(record)
        self.log.print(record)
        self.log.warn(*saved.warnings)

    def _tolerate(self, error: StorageError, *, last: bool) -> None:
        if last or self.config.save_failure == "stop" or isinstance(error, FolderTaken):
            raise error
        step = self.run.progress.step
        self.log.warn(f"iteration {step}: no checkpoint, training continues: {error}")

    def _snapshot(self, store: Store) -> Snapshot:
        run, kept = self.run, self.run.adapters
        weights = run.engine.weights(owned=True)
        return store.snapshot(
            run.progress.step,
            weights=(one for one in weights if one.name in kept) if kept else weights,
            optimizer=run.engine.state(owned=True) if self.config.save_optim else (),
            progress=run.progress,
            config=self.plain_config,
            origin=self.origin,
        )
