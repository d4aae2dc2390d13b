"""One run per folder: a lock file that names its owner, and tells whether the owner is alive.

    take ──▶ run.lock ◀── every RENEW_SECONDS the owner's heartbeat: a counter
               │   ▲
               │   └───── before each checkpoint appears: is it still ours?
               └─ another start reads it: an owner of its own machine and PID namespace is looked
                  up in /proc; any other is watched by the reader's own clock, and who does not
                  count for STALE_SECONDS is dead

No clocks of two machines are compared, no name of a host is trusted: both are for messages only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from megatron_lite.config.errors import StorageError
from megatron_lite.storage.disk import Disk, DiskFile
from megatron_lite.storage.reading import read_plain

LOCK = "run.lock"
RENEW_SECONDS = 10.0
STALE_SECONDS = 60.0
LOCK_PATIENCE_SECONDS = 1.0
"""A folder that is back after this was never gone."""
_ATTEMPTS = 100  # to make a file that others make and remove at the same time
_TURN_SECONDS = 5.0
_LARGEST = 1 << 16
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class FolderTaken(StorageError):
    """Another run has this folder now: nothing may be written there, whatever the policy."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a folder.

    start: of the process, in ticks since the boot.  boot, namespaces: "" where the system does
    not say.  folder: device and inode, so that a copied folder's lock is not taken for a living one.
    token: of this one taking.
    """

    host: str
    pid: int
    start: str
    boot: str
    namespaces: str
    folder: str
    since: str
    token: str

    @classmethod
    def here(cls, folder: Path) -> Owner:
        """This process."""
        return cls(
            host=platform.node(),
            pid=os.getpid(),
            start=_start_of("self")[0],
            boot=_text(Path("/proc/sys/kernel/random/boot_id")),
            namespaces="/".join(_target(Path("/proc/self/ns") / kind) for kind in ("pid", "time")),
            folder=_identity(folder),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            token=secrets.token_hex(8),
        )

    def to_bytes(self, count: int) -> bytes:
        """The content of the lock; as long for every count."""
        return (json.dumps(asdict(self) | {"count": f"{count:012d}"}) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Owner | None:
        """None for what no run of this project has written."""
        try:
            values = json.loads(data)
            del values["count"]
            found = cls(**values)
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        kinds = all(isinstance(value, str) for name, value in values.items() if name != "pid")
        return found if kinds and isinstance(found.pid, int) and found.pid > 0 else None

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.since}"

    def fate(self, here: Owner) -> Literal["alive", "dead", "unknown"]:
        """What this process can find out by looking; a stopped process may be as good as dead."""
        same = (self.boot, self.namespaces, self.folder) == (
            here.boot, here.namespaces, here.folder,
        )  # fmt: skip
        # a /proc of another PID namespace numbers processes otherwise
        known = same and self.boot and self.start and self.namespaces.startswith("pid:")
        if not known or _target(Path("/proc/self")) != str(os.getpid()):
            return "unknown"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return "dead"
        except OSError:
            pass  # another user's process
        start, state = _start_of(str(self.pid))
        if not start:  # hidden from us
            return "unknown"
        if start != self.start or state in ("Z", "X"):
            return "dead"
        return "unknown" if state in ("T", "t") else "alive"


@dataclass(slots=True)
class FolderLock:
    """The lock of this process on a folder; renewed by a thread until release()."""

    folder: Path
    owner: Owner
    disk: Disk
    problem: StorageError | None = None
    """What the thread saw last: the folder or the lock is not what it was."""
    told: bool = False
    """Whether the problem has been reported."""
    _file: DiskFile | None = None
    _count: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def take(
        cls, folder: Path, disk: Disk, say: Callable[[str], None], *, pause: float = 0.5
    ) -> FolderLock:
        """Hold the folder, which is made; waits up to STALE_SECONDS where the owner may be dead.

        Raises FolderTaken where another run has it, StorageError where no file can be made.  say: is
        told what is waited for.
        """
        folder = folder.absolute()
        disk.make_folder(folder)
        lock = cls(folder, Owner.here(folder), disk)
        for _ in range(_ATTEMPTS):
            with _one_at_a_time(folder):
                if lock._create():
                    threading.Thread(target=lock._renew, name="run-lock", daemon=True).start()
                    return lock
                found = _read(folder / LOCK)
                if lock._is_dead(found):
                    lock._remove(found)
                    continue
            if found is not None and lock._is_silent(found, say, pause):
                with _one_at_a_time(folder):
                    lock._remove(found)
        raise StorageError(f"{folder / LOCK} comes and goes: several starts want one folder")

    def _is_dead(self, found: bytes | None) -> bool:
        """Raises FolderTaken where the owner lives."""
        owner = Owner.from_bytes(found) if found else None
        fate = owner.fate(self.owner) if owner is not None else "unknown"
        if fate == "alive":
            assert found is not None
            raise self._taken(found)
        return fate == "dead"

    def _is_silent(self, found: bytes, say: Callable[[str], None], pause: float) -> bool:
        """Whether the lock stays as it is for STALE_SECONDS; False where it is gone before.

        Raises FolderTaken where it changes.
        """
        owner = Owner.from_bytes(found)
        say(
            f"waiting for up to {STALE_SECONDS:g} s: {self.folder / LOCK} is of {owner or 'another run'}, "
            "which cannot be seen at work from here; if it does not count on in that file, it is dead"
        )
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(pause)
            now = _read(self.folder / LOCK)
            if now is None:
                return False
            if now != found:
                raise self._taken(now)
        return True

    def _create(self) -> bool:
        """Whether there was none; StorageError where none can be."""
        path = self.folder / LOCK
        try:
            file = self.disk.create(path)
        except StorageError as error:
            if isinstance(error.__cause__, FileExistsError):
                return False
            raise
        try:
            file.write(self.owner.to_bytes(self._count))
            file.fsync()
        except StorageError:  # an empty lock has no owner and would hold others up
            self.disk.remove(path)
            raise
        self._file = file
        return True

    def _remove(self, judged: bytes | None) -> None:
        """Take away the lock that was judged; one that came into its place meanwhile is put back."""
        aside = self.folder / f".{LOCK}.{secrets.token_hex(6)}.partial"
        try:
            self.disk.rename(self.folder / LOCK, aside)
        except StorageError:
            return  # another start was quicker
        if _read(aside) != judged:
            with contextlib.suppress(StorageError):
                self.disk.link(aside, self.folder / LOCK)
        self.disk.remove(aside)

    def _taken(self, found: bytes) -> FolderTaken:
        owner = Owner.from_bytes(found)
        return FolderTaken(
            f"--save {self.folder} is in use by {owner or 'another run'}, which is still there - two "
            "runs in one folder spoil each other: stop it and start again, or give another --save"
        )

    # -- while the run lasts -------------------------------------------------------------------

    def check(self) -> None:
        """Raise FolderTaken where another run has the folder, StorageError where it is not there."""
        with self._mutex:
            if self._ended.is_set():
                raise StorageError(
                    f"this run has left --save {self.folder}: nothing is written there"
                )
            found = self._own_or_none()
            if found is None and not self._create():  # it was removed: no run has the folder
                found = self._own_or_none()

    def _own_or_none(self) -> Owner | None:
        path = self.folder / LOCK
        try:
            found = read_plain(path, _LARGEST, links=False)
        except OSError as error:
            if error.errno not in _GONE:
                raise StorageError(
                    f"{path} cannot be read: {error.strerror} - look at the file system of --save"
                ) from error
            if _identity(self.folder) == self.owner.folder:
                return None
            raise StorageError(
                f"--save {self.folder} is not there any more as this run began it: it was renamed, "
                "removed or unmounted - put it back to its place"
            ) from None
        owner = Owner.from_bytes(found)
        if owner is None or owner.token != self.owner.token:
            raise FolderTaken(
                f"--save {self.folder} was taken over by {owner or 'another run'}: this process did not "
                f"renew {LOCK} for {STALE_SECONDS:g} s (stopped, or its network was down), or somebody "
                "removed it - this run stops so that the other's checkpoints stay whole"
            )
        return owner

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            self._count += 1
            if self._file is not None:
                # a failure shows in check(); while the disk is only slow, nothing is wrong
                with contextlib.suppress(StorageError):
                    self._file.rewrite(self.owner.to_bytes(self._count))
                    self._file.fsync()
            self.look()

    def look(self) -> None:
        """Set `problem`; one that passes is none."""
        for patience in (LOCK_PATIENCE_SECONDS, 0.0):
            try:
                self.check()
            except StorageError as error:
                if patience and self._ended.wait(patience):
                    return
                if not patience:
                    self.problem = error
            else:
                self.problem, self.told = None, False
                return

    def release(self) -> None:
        """Let others have the folder; whatever happened to it."""
        with self._mutex, contextlib.suppress(StorageError):
            if self._ended.is_set():
                return
            self._ended.set()
            if self._file is not None:
                self._file.close()
            found = Owner.from_bytes(_read(self.folder / LOCK) or b"")
            if found is not None and found.token == self.owner.token:
                self.disk.remove(self.folder / LOCK)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Starts of one machine go through one by one; where that cannot be had, they are only careful."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        end = time.monotonic() + _TURN_SECONDS
        while time.monotonic() < end:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:  # a file system without
                break
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes | None:
    """None where there is no such file; StorageError for what no run of this project has put there."""
    try:
        return read_plain(path, _LARGEST, links=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror} - remove it") from error


def _identity(folder: Path) -> str:
    try:
        status = folder.stat()
    except OSError:
        return ""
    return f"{status.st_dev}:{status.st_ino}"


def _start_of(process: str) -> tuple[str, str]:
    """(ticks from the boot to its start, state letter); "" where it cannot be seen."""
    fields = _text(Path("/proc") / process / "stat").rpartition(")")[2].split()
    return (fields[19], fields[0]) if len(fields) > 19 else ("", "")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
