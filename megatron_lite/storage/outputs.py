"""A tool's outputs, checked before its work begins: names, folders, permissions, free space.

    check_outputs("--output-prefix", ["out/a.bin", "out/a.idx"], disk, needed=2_000_000)

The check leaves nothing behind.  What only shows later (a disk that fills up) Disk reports.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from megatron_lite.config.errors import ConfigError, StorageError
from megatron_lite.storage.disk import Bytes, Disk, nearest_folder, temporary_name, write_atomically

NAME_MAX, PATH_MAX = 255, 4096  # bytes, of the file systems people have


def check_outputs(
    flag: str, paths: Sequence[str | os.PathLike[str]], disk: Disk, *, needed: int = 0
) -> None:
    """The files may be written: ConfigError for a name, StorageError for folder, rights and room.

    needed: bytes of all of them together.  Folders that are missing are made when they are written.
    """
    folders: dict[Path, str] = {}
    for path in paths:
        name = os.fspath(path)
        _check_name(flag, name)
        _check_place(flag, Path(name))
        folders.setdefault(_nearest(flag, Path(name).absolute().parent), name)
    for folder, name in folders.items():
        _check_folder(flag, folder, name, disk)
        require_room(flag, folder, needed, disk)


def check_folder(
    flag: str,
    path: str | os.PathLike[str],
    disk: Disk,
    *,
    needed: int = 0,
    may_be_full: bool = False,
) -> None:
    """A folder may be made, and files in it.

    may_be_full: of one that is there only name and kind are looked at; it may be read-only, too.
    """
    name = os.fspath(path)
    if not name:
        raise ConfigError(f"{flag} is empty - name a folder")
    _check_length(flag, name.rstrip("/") + "/name")
    if not os.path.isdir(name):  # made under another name first
        _check_length(flag, name.rstrip("/"))
    folder = _nearest(flag, Path(name).absolute())
    if may_be_full and os.path.isdir(name):
        return
    _check_folder(flag, folder, name, disk)
    require_room(flag, folder, needed, disk)


def check_prefix(flag: str, prefix: str) -> None:
    """The folder and the first part of several files' names: ConfigError where it is only a folder."""
    if prefix.endswith("/") or Path(prefix).name in ("", ".", ".."):
        raise ConfigError(
            f"{flag} {prefix} is a folder - give the first part of the files' names, too: "
            f"{prefix.rstrip('/') or '.'}/corpus"
        )


def pair_paths(prefix: str) -> list[str]:
    """The names of a pair of token files and of what is known about it."""
    return [f"{prefix}.{suffix}" for suffix in ("bin", "idx", "meta.json")]


def require_room(flag: str, path: str | os.PathLike[str], needed: int, disk: Disk) -> None:
    """StorageError where fewer bytes are free than will be written."""
    free = disk.free_bytes(path)
    if free < needed:
        raise StorageError(
            f"{flag}: {path} has {free} bytes free, but {needed} bytes are needed "
            f"({needed / 1e9:.3f} GB) - free some space or choose another folder"
        )


def write_output(path: str | os.PathLike[str], data: Bytes, disk: Disk) -> None:
    """Write a file that was checked before: whole or absent, in a folder made for it."""
    real = Path(os.path.realpath(path))
    disk.make_folder(real.parent)
    write_atomically(real, data, disk)


def _check_name(flag: str, name: str) -> None:
    if not name or name.endswith("/") or Path(name).name in ("", ".", ".."):
        raise ConfigError(f"{flag} {name or '(empty)'} is no file's name - add one to the folder")
    _check_length(flag, name)


def _check_length(flag: str, name: str) -> None:
    """No part of the path is too long, the name under which a file is written first included."""
    if "\0" in name:
        raise ConfigError(f"{flag} {name!r} holds a NUL byte, which no name may")
    parts = [*Path(name).absolute().parts, temporary_name(name).name]
    part = max(len(os.fsencode(part)) for part in parts)
    path = len(os.fsencode(Path(name).absolute()))
    if part > NAME_MAX or path >= PATH_MAX:
        raise ConfigError(
            f"{flag} {name[:80]}... is too long: {path} bytes (at most {PATH_MAX - 1}), a part of it "
            f"{part} while it is written (at most {NAME_MAX}) - choose a shorter name"
        )


def _nearest(flag: str, path: Path) -> Path:
    """The closest parent that exists; StorageError where it may not be looked for."""
    try:
        return nearest_folder(path)
    except OSError as error:
        raise StorageError(f"{flag} {path} cannot be looked at: {error.strerror} - choose a folder "
                           "you may write to") from error  # fmt: skip


def _check_place(flag: str, path: Path) -> None:
    """What is there already is a file that can be replaced, or nothing."""
    if path.absolute().parent == Path("/dev"):
        raise ConfigError(f"{flag} {path} is no file - give a file's name; leave the flag out to "
                          "have it printed where that is possible")  # fmt: skip
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise StorageError(f"{flag} {path}: a part of the path is a file - choose another folder"
                           ) from error  # fmt: skip
    except OSError as error:
        raise StorageError(f"{flag} {path} cannot be looked at: {error.strerror} - choose a folder "
                           "you may write to") from error  # fmt: skip
    if stat.S_ISDIR(mode):
        raise ConfigError(f"{flag} {path} is a folder - give a file's name")
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{flag} {path} is a device or a pipe - give a file's name")


def _check_folder(flag: str, folder: Path, asked: str, disk: Disk) -> None:
    """Something is really written: permissions alone do not tell (root, read-only, quota)."""
    if not folder.is_dir():
        raise StorageError(f"{flag} {asked}: {folder} is a file - choose another folder")
    try:
        disk.try_out(folder)
    except StorageError as error:
        raise StorageError(f"{flag} {asked}: {error}") from error
