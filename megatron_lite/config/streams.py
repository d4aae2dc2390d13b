"""stdout and stderr that never end or block the work: text they do not accept waits and is retried.

    print ─▶ Outlet ─▶ the descriptor            full disk, broken pipe, closed, a reader that stands still:
               │                                 the text waits here (1 MiB of it), the next print tries again
               └─▶ told on the other stream, else `elsewhere`

A training, or a preprocessing of hours, is about its files; losing its output is a warning.  A tool whose
result is what it prints (exit.run_tool, results=True) has a strict Outlet, which raises.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from megatron_lite.config.errors import MegatronLiteError, StorageError

WAITING_BYTES = 1 << 20
"""Text kept for a stream that takes none; what comes after it is lost."""

READER_PATIENCE_SECONDS = 5.0
"""How long one print waits for a reader that stands still; the next ones do not wait."""

TELL_AGAIN_SECONDS = 60.0


class ReaderGone(MegatronLiteError):
    """Who reads the results has seen enough (`| head`): end without a word, as other programs do."""

    exit_code = 128 + signal.SIGPIPE


class Outlet(io.TextIOBase):
    """A text stream over a descriptor (None: closed) whose write() neither raises nor blocks for good.

    strict: it does both, since what it prints is the result.  witness: the other stream, which is told.
    """

    def __init__(
        self, name: str, descriptor: int | None, old: TextIO | None, *, strict: bool = False
    ) -> None:
        self.witness: Outlet | None = None
        self.lock = threading.RLock()
        self.failing = False
        self._name, self._descriptor, self._strict = name, descriptor, strict
        self._encoding = getattr(old, "encoding", None) or "utf-8"
        self._errors = getattr(old, "errors", None) or "strict"
        if self._errors == "strict":  # a character that the locale lacks ends nothing
            self._errors = "backslashreplace"
        self._raw = None if descriptor is None else _raw(descriptor)
        self._tty = old is not None and old.isatty()
        self._waiting = bytearray()
        self._reason = ""
        self._lost_lines = self._marked = self._marks_waiting = 0
        self._elsewhere: Callable[[str], None] | None = None
        self._untold: list[str] = []
        self._told = -TELL_AGAIN_SECONDS
        self._stuck = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream in whose place this is."""
        return self._encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        """A character that the encoding lacks is written as \\uXXXX."""
        return self._errors

    def isatty(self) -> bool:
        """Whether a person reads along."""
        return self._tty

    def fileno(self) -> int:
        """The descriptor; OSError where there is none."""
        if self._descriptor is None:
            raise OSError(errno.EBADF, f"{self._name} is closed")
        return self._descriptor

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Take the text; whole lines are written."""
        with self.lock:
            self._waiting += text.encode(self._encoding, self._errors)
            if "\n" in text or len(self._waiting) > 8192:
                self._push()
        return len(text)

    def flush(self) -> None:
        """Try what waits."""
        with self.lock:
            self._push()

    def summary(self) -> str:
        """What is lost, what waits counted too; "" for nothing."""
        with self.lock:
            lost = self._lost_lines + self._waiting.count(b"\n") - self._marks_waiting
            return f"{self._name}: {lost} lines were lost ({self._reason})" if lost else ""

    def notify(self, line: str) -> None:
        """The line on the other stream, or elsewhere if that takes nothing either."""
        witness = self.witness
        if witness is not None and not witness.failing:
            witness.write(f"{line}\n")
        if witness is None or witness.failing:
            self._untold.append(line)
            self.confide(self._elsewhere)

    def confide(self, elsewhere: Callable[[str], None] | None) -> None:
        """Tell `elsewhere`, from now on, what the other stream cannot be told."""
        self._elsewhere = elsewhere
        while elsewhere is not None and self._untold:
            elsewhere(self._untold.pop(0))

    def _push(self) -> None:
        try:
            self._drain()
            if self._marked < self._lost_lines:
                mark = f"[{self._lost_lines} lines were lost up to here: {self._reason}]\n"
                self._waiting += mark.encode()
                self._marked, self._marks_waiting = self._lost_lines, 1
                self._drain()
            self.failing, self._stuck, self._marks_waiting = False, False, 0
        except (OSError, ValueError) as error:  # ValueError: somebody has closed the file object
            self._reason = getattr(error, "strerror", None) or str(error)
            if self._strict:
                self._waiting.clear()
                raise self._in_our_words(error) from error
            self._stuck = self._stuck or isinstance(error, TimeoutError)
            self._keep_or_lose()

    def _drain(self) -> None:
        if self._raw is None and self._waiting:
            raise OSError(errno.EBADF, "it was closed when the program started")
        patience = 0.0 if self._stuck else math.inf if self._strict else READER_PATIENCE_SECONDS
        end = time.monotonic() + patience
        while self._waiting:
            assert self._raw is not None
            written = self._raw.write(bytes(self._waiting[:65536]))
            if written:
                del self._waiting[:written]
                end = time.monotonic() + patience
                continue
            if time.monotonic() >= end:
                raise TimeoutError(errno.ETIMEDOUT, "its reader stands still")
            waiter = select.poll()
            waiter.register(self._raw, select.POLLOUT)
            waiter.poll(200)

    def _keep_or_lose(self) -> None:
        first, self.failing = not self.failing, True
        if len(self._waiting) > WAITING_BYTES:
            self._lost_lines += self._waiting.count(b"\n") - self._marks_waiting
            self._waiting[:] = b"\n"  # the end of a line of which the begin is out already
            self._marks_waiting = 1
        if first and time.monotonic() - self._told >= TELL_AGAIN_SECONDS:
            self._told = time.monotonic()
            self.notify(
                f"WARNING: {self._name} takes no more text ({self._reason}); the work continues, lines "
                "wait and are tried again"
            )

    def _in_our_words(self, error: Exception) -> MegatronLiteError:
        if isinstance(error, BrokenPipeError):
            return ReaderGone("the reader is gone")
        return StorageError(
            f"{self._name} cannot be written: {self._reason} - the result is what is printed there: "
            "give it a place with room"
        )


def _raw(descriptor: int) -> io.RawIOBase:
    """The descriptor unbuffered; a pipe or terminal opened anew, so that only we do not wait there.

    O_NONBLOCK belongs to the open file, which other processes share: a second one is ours alone.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISFIFO(mode) or (stat.S_ISCHR(mode) and os.isatty(descriptor)):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with contextlib.suppress(OSError):
            return io.FileIO(os.open(f"/proc/self/fd/{descriptor}", flags), "w")
    return io.FileIO(descriptor, "w", closefd=False)


def occupy_standard_descriptors() -> None:
    """Let 0, 1 and 2 be open: a file opened where one was closed would get what is printed there."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one


def outlive_output(*, results: bool = False) -> None:
    """Put Outlets in the place of this process's stdout and stderr; those of a test stay.

    results: stdout is what the program is for, so that it must be written, or the program ends.
    """
    occupy_standard_descriptors()
    made = {}
    for name in ("stdout", "stderr"):
        old, strict = getattr(sys, name), results and name == "stdout"
        if old is None:
            made[name] = Outlet(name, None, None, strict=strict)
        elif old is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError, ValueError):
                old.flush()
            with contextlib.suppress(OSError, ValueError):
                made[name] = Outlet(name, old.fileno(), old, strict=strict)
    for name, outlet in made.items():
        setattr(sys, name, outlet)
    if len(made) == 2:
        out, err = made.values()
        out.witness, err.witness, err.lock = err, out, out.lock


def outlets() -> list[Outlet]:
    """Those of the process."""
    return [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, Outlet)]


def settle_output() -> None:
    """At the end: try what still waits, and say what is lost on whatever works."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    for outlet in outlets():
        summary = outlet.summary()
        if summary:
            outlet.notify(f"WARNING: {summary}")
