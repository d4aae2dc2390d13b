"""Reads small files defensively: a pipe, a device, a folder or a terabyte of zeros may lie in their place."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}


class NotPlain(OSError):
    """What lies there is no regular file, or none of a plausible size; strerror says what it is."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(errno.EINVAL, what, str(path))


def read_plain(path: str | os.PathLike[str], at_most: int, *, links: bool = True) -> bytes:
    """The whole content of a regular file of at most so many bytes.

    Never waits and never reads more; raises OSError, NotPlain for anything else than such a file.
    links: whether the file itself may be a link to one.
    """
    place = Path(path)
    if not links and place.is_symlink():
        raise NotPlain(place, "is a link, not a regular file")
    with open_plain(place, at_most) as file:
        return file.read(at_most)


def open_plain(path: str | os.PathLike[str], at_most: int | None = None) -> BinaryIO:
    """A regular file of at most so many bytes, opened for reading without waiting; or OSError."""
    # O_NONBLOCK: a named pipe without a writer opens at once
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        require_plain(Path(path), os.fstat(descriptor), at_most)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_plain(path: Path, found: os.stat_result, at_most: int | None = None) -> None:
    """Raise NotPlain where it is no regular file or larger than at_most bytes."""
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise NotPlain(path, f"is {kind}, not a regular file")
    if at_most is not None and found.st_size > at_most:
        raise NotPlain(path, f"has {found.st_size} bytes, and no such file has more than {at_most}")
