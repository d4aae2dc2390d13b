"""Every write of data tools and checkpoints, one primitive at a time, so that a test can intercept it.

    caller ─▶ Disk.rename ─▶ Disk._run (OSError becomes StorageError) ─▶ Disk._operate ─▶ os
                                                                       (overridable)

A name the reader looks for appears only by `rename` of a file that is complete and fsynced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_lite.config.errors import StorageError

_Result = TypeVar("_Result")
Bytes = bytes | bytearray | memoryview

CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)

NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)

WAYS_OUT = {
    errno.ENOSPC: "free some space there or choose another folder",
    errno.EDQUOT: "your quota is used up: free some space there or choose another folder",
    errno.EROFS: "the file system is read-only: choose a folder that can be written",
    errno.EACCES: "no permission: choose a folder you may write to",
    errno.EPERM: "no permission: choose a folder you may write to",
    errno.EIO: "the device reports an error: look at the disk and choose another folder",
    errno.EEXIST: "remove it or choose another name",
    errno.ENOENT: "the folder does not exist or was removed while it was in use",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One primitive about to happen, with rename's second path or the bytes of a write.

    A disk that tears writes calls `append` with a part of `data`.
    """

    kind: str
    path: Path
    target: Path | None = None
    data: memoryview | None = None
    append: Callable[[memoryview], None] | None = None


def storage_error(operation: Operation, error: OSError) -> StorageError:
    """The failure in words: path, operation, the system's text and the way out."""
    names = str(operation.path)
    if operation.target is not None:
        names += f" to {operation.target}"
    size = f" of {operation.data.nbytes} bytes" if operation.data is not None else ""
    way_out = WAYS_OUT.get(error.errno or 0, "check the path and the file system")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(nearest_folder(operation.path)).free
            way_out = f"{free} bytes are free; {way_out}"
    text = error.strerror or str(error)
    return StorageError(f"{operation.kind}{size} failed: {names}: {text} - {way_out}")


def nearest_folder(path: Path) -> Path:
    """The path itself or its closest parent that exists."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path


class DiskFile:
    """A new file being written; unbuffered, so that a write is one operation."""

    def __init__(self, disk: Disk, path: Path, descriptor: int) -> None:
        self.path = path
        self.size = 0
        self._advised = 0
        self._disk = disk
        self._descriptor: int | None = descriptor

    def write(self, data: Bytes) -> None:
        """Append all bytes of a C-contiguous buffer."""
        view = memoryview(data)
        if view.nbytes == 0:
            return
        view = view.cast("B")
        operation = Operation("write", self.path, data=view, append=self._append)
        self._disk._run(operation, lambda: self._append(view))

    def _append(self, view: memoryview) -> None:
        assert self._descriptor is not None, f"{self.path} is closed"
        while view.nbytes:
            written = os.write(self._descriptor, view[: 1 << 30])  # Linux writes < 2 GiB at a time
            self.size += written
            view = view[written:]

    def rewrite(self, data: Bytes) -> None:
        """Put as many bytes as the file has in the place of its own; a reader sees either."""
        view, descriptor = memoryview(data).cast("B"), self._descriptor
        assert descriptor is not None and view.nbytes == self.size, f"{self.path}: {view.nbytes}"
        operation = Operation("rewrite", self.path, data=view)
        self._disk._run(operation, lambda: os.pwrite(descriptor, view, 0))

    def start_write_back(self) -> None:
        """Let the system begin to move to the device what it holds of this file, without waiting.

        For long files: the device then works while the next bytes are made, fsync finds little
        left to do, and the cache is not filled with what is never read.  Advice: it cannot fail.
        """
        start, self._advised = self._advised, self.size
        if self._descriptor is not None and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                # on Linux this starts the writing of dirty pages, and drops only clean ones
                advice = os.POSIX_FADV_DONTNEED
                os.posix_fadvise(self._descriptor, start, self.size - start, advice)

    def fsync(self) -> None:
        """Return only when the bytes are on the device."""
        descriptor = self._descriptor
        assert descriptor is not None, f"{self.path} is closed"
        self._disk._run(Operation("fsync", self.path), lambda: os.fsync(descriptor))

    def close(self) -> None:
        """Close; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            self._disk._run(Operation("close", self.path), lambda: os.close(descriptor))

    def __enter__(self) -> DiskFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Disk:
    """The real disk; subclasses override `_operate` to record, fail or crash (storage/faults.py).

    Every method raises StorageError (exit 5) naming path, operation, reason and the way out.
    """

    def _operate(self, operation: Operation, action: Callable[[], _Result]) -> _Result:
        """Carry out one primitive; the only thing a test's disk overrides."""
        return action()

    def _run(self, operation: Operation, action: Callable[[], _Result]) -> _Result:
        try:
            return self._operate(operation, action)
        except OSError as error:
            raise storage_error(operation, error) from error

    def make_folder(self, path: str | os.PathLike[str]) -> None:
        """Make the folder and its parents; one that exists is fine."""
        folder = Path(path)
        self._run(
            Operation("make_folder", folder), lambda: folder.mkdir(parents=True, exist_ok=True)
        )

    def create(self, path: str | os.PathLike[str]) -> DiskFile:
        """Open a new file for writing; a file or link already there is an error."""
        new = Path(path)
        descriptor = self._run(Operation("create", new), lambda: os.open(new, CREATE_FLAGS, 0o666))
        return DiskFile(self, new, descriptor)

    def reopen(self, path: str | os.PathLike[str], size: int) -> DiskFile:
        """Open a file to be continued after its first `size` bytes; what follows is cut off."""
        old = Path(path)

        def cut() -> int:
            descriptor = os.open(old, os.O_WRONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
            try:
                os.ftruncate(descriptor, size)
                os.lseek(descriptor, size, os.SEEK_SET)
            except OSError:
                os.close(descriptor)
                raise
            return descriptor

        file = DiskFile(self, old, self._run(Operation("reopen", old), cut))
        file.size = size
        return file

    def try_out(self, path: str | os.PathLike[str]) -> None:
        """Write a byte to a file of the folder that has no name, or soon has none; nothing stays."""
        folder = Path(path)

        def write() -> None:
            try:
                descriptor = os.open(folder, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
            except (OSError, AttributeError) as error:
                # network file systems and kernels without such files say so with these
                if isinstance(error, OSError) and error.errno not in NO_NAMELESS:
                    raise
                named = temporary_name(folder / "probe")
                descriptor = os.open(named, CREATE_FLAGS, 0o600)
                named.unlink()
            try:
                os.write(descriptor, b"\0")
            finally:
                os.close(descriptor)

        self._run(Operation("try_out", folder), write)

    def rename(self, a: str | os.PathLike[str], b: str | os.PathLike[str]) -> None:
        """Give a the name b in one step, replacing what was there; sync_folder makes it last."""
        self._run(Operation("rename", Path(a), target=Path(b)), lambda: os.replace(a, b))

    def take_place(self, a: str | os.PathLike[str], b: str | os.PathLike[str]) -> None:
        """Rename a file to b; an empty folder of that name gives way, as everything else does."""
        with contextlib.suppress(OSError):
            os.rmdir(b)
        self.rename(a, b)

    def link(self, a: str | os.PathLike[str], b: str | os.PathLike[str]) -> None:
        """Give a the name b as well; a b that is there is an error."""
        self._run(Operation("link", Path(a), target=Path(b)), lambda: os.link(a, b))

    def sync_folder(self, path: str | os.PathLike[str]) -> None:
        """Return only when the folder's names are on the device."""
        folder = Path(path)

        def sync() -> None:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            except OSError as error:
                # some network file systems cannot sync a folder and say so with these two
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
            finally:
                os.close(descriptor)

        self._run(Operation("sync_folder", folder), sync)

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Remove a file; one that is not there is fine."""
        old = Path(path)
        self._run(Operation("remove", old), lambda: old.unlink(missing_ok=True))

    def remove_empty(self, path: str | os.PathLike[str]) -> None:
        """Remove a folder that holds nothing; another is an error."""
        folder = Path(path)
        self._run(Operation("remove_empty", folder), folder.rmdir)

    def remove_tree(self, path: str | os.PathLike[str]) -> None:
        """Remove a folder with all it holds, a file, or a link itself; what is not there is fine."""
        folder = Path(path)

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                if folder.is_dir() and not folder.is_symlink():
                    shutil.rmtree(folder)
                else:
                    folder.unlink()

        self._run(Operation("remove_tree", folder), remove)

    def free_bytes(self, path: str | os.PathLike[str]) -> int:
        """Bytes a user may still write where the path is or will be."""
        place = Path(path)
        return self._run(
            Operation("free_bytes", place),
            lambda: shutil.disk_usage(nearest_folder(place.absolute())).free,
        )


def temporary_name(path: str | os.PathLike[str]) -> Path:
    """A name beside the path that no reader looks for and that cannot be guessed."""
    final = Path(path)
    return final.with_name(f".{final.name}.{secrets.token_hex(6)}.partial")


def write_atomically(path: str | os.PathLike[str], data: Bytes, disk: Disk) -> None:
    """Write a file that is whole or absent: temporary name, fsync, rename, sync of the folder."""
    final = Path(path)
    temporary = temporary_name(final)
    try:
        with disk.create(temporary) as file:
            file.write(data)
            file.fsync()
        disk.take_place(temporary, final)
    except BaseException:
        with contextlib.suppress(StorageError):
            disk.remove(temporary)
        raise
    disk.sync_folder(final.parent)


@contextlib.contextmanager
def folder_at_once(path: str | os.PathLike[str], disk: Disk) -> Iterator[Path]:
    """A folder that appears whole: what the body puts into the yielded one is there, or nothing is.

    The body fsyncs its files, and folders inside.  The final folder must be absent or empty; what
    a crash left half-written is cleared away by the next one.
    """
    final = Path(path)
    partial = final.with_name(f".{final.name}.partial")
    disk.remove_tree(partial)
    disk.make_folder(partial)
    try:
        yield partial
        disk.sync_folder(partial)
        disk.rename(partial, final)
    except BaseException:
        with contextlib.suppress(StorageError):
            disk.remove_tree(partial)
        raise
    disk.sync_folder(final.parent)
