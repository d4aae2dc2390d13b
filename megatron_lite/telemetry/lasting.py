"""A log that may fail and come back: its records wait, are retried, and are counted where lost."""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from megatron_lite.config.errors import ConfigError, StorageError
from megatron_lite.telemetry.record import TelemetryRecord

WAITING_RECORDS = 10_000
"""Records kept for a log that takes none; the oldest go first."""

PAUSES = (1.0, 600.0)
"""Seconds until a failed log is tried again: the first time, and at most; doubled in between."""

PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EFBIG)
"""What may be over when a log is opened again; other failures at the start are the user's to mend."""


class Writer(Protocol):
    """Takes every record of a run.  After a failure it is opened again before the next write."""

    name: str

    def open(self) -> None:
        """Open, or open again after a failure, appending to what is written."""
        ...

    def write(self, record: TelemetryRecord) -> None:
        """Keep or pass on one record; cheap for a kind that does not concern it."""
        ...

    def close(self) -> None:
        """Write what is still held back."""
        ...


class Lasting:
    """One writer whose failures are warnings.

    warn: told once when the writer fails, once when it works again, and at the end what was lost.
    """

    def __init__(
        self,
        writer: Writer,
        warn: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.writer = writer
        self._warn, self._clock = warn, clock
        self._waiting: deque[TelemetryRecord] = deque()
        self._lost = 0
        self._reason = ""
        self._pause, self._retry_at = PAUSES[0], 0.0

    def open(self) -> None:
        """Open for the first time; what is wrong for good, as a missing package, is raised."""
        try:
            self.writer.open()
        except ConfigError:
            raise
        except StorageError as error:
            cause = error.__cause__
            if not (isinstance(cause, OSError) and cause.errno in PASSING):
                raise
            self._failed(error)
        except Exception as error:  # a package of others may raise anything
            self._failed(error)

    def write(self, record: TelemetryRecord) -> None:
        """Hand the record on, or keep it until the writer works again."""
        self._waiting.append(record)
        if len(self._waiting) > WAITING_RECORDS:
            self._waiting.popleft()
            self._lost += 1
        if not self._reason or self._clock() >= self._retry_at:
            self._try()

    def close(self) -> None:
        """Try a last time; say what was lost."""
        if self._reason:
            self._try()
        try:
            if not self._reason:
                self.writer.close()
        except Exception as error:  # a package of others may raise anything
            self._warn(
                f"{self.writer.name} could not be closed, its end may be missing: {_text(error)}"
            )
        self._lost += len(self._waiting)
        if self._lost:
            self._warn(
                f"{self.writer.name}: {self._lost} records were lost ({self._reason or 'for a time'})"
            )

    def _try(self) -> None:
        failing = bool(self._reason)
        try:
            if failing:
                self.writer.open()
            while self._waiting:
                self.writer.write(self._waiting[0])
                self._waiting.popleft()
        except Exception as error:  # a package of others may raise anything
            self._failed(error)
            return
        self._reason, self._pause = "", PAUSES[0]
        if failing:
            self._warn(f"{self.writer.name} works again")

    def _failed(self, error: Exception) -> None:
        if not self._reason:
            self._warn(
                f"{self.writer.name} takes no more records, training continues and tries again: "
                f"{_text(error)}"
            )
        self._reason = _text(error)
        self._retry_at = self._clock() + self._pause
        self._pause = min(2 * self._pause, PAUSES[1])


def _text(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
