"""Which checkpoint of a folder to load: what rank 0 sees there, whatever else lies beside it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_lite.config.errors import StorageError
from megatron_lite.storage.reading import read_plain

POINTER = "latest_checkpointed_iteration.txt"
_FOLDER = re.compile(r"iter_(\d{7,15})", re.ASCII)
_POINTER_BYTES = 1 << 10


def folder_of(root: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return root / f"iter_{iteration:07d}"


def iterations(root: Path) -> list[int]:
    """Iterations of all checkpoint folders, newest first, intact or not; links are none."""
    return [n for n, entry in _named(root) if entry.is_dir() and not entry.is_symlink()]


def _named(root: Path) -> list[tuple[int, Path]]:
    """What bears the name of a checkpoint, newest first.

    Nothing where there is no such folder; raises StorageError where nobody can tell.
    """
    try:
        names = [_FOLDER.fullmatch(name) for name in os.listdir(root)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(
            f"{root} cannot be looked into: {error.strerror} - ask for permission to read the folder "
            "and to enter those above it, or give another one"
        ) from error
    found = [(int(name[1]), root / name[0]) for name in names if name]
    return sorted(((n, path) for n, path in found if folder_of(root, n) == path), reverse=True)


def to_try(root: Path, step: int | None, notices: list[str]) -> list[int]:
    """What to try in turn: the pointer's choice, then the newest; or `step` alone.

    notices: gets a line about everything that is not as a save leaves it.
    """
    for _, entry in _named(root):
        if entry.is_symlink() or not entry.is_dir():
            kind = "a link" if entry.is_symlink() else "no folder"
            notices.append(f"{entry} is {kind} and no checkpoint: passed over")
    found = iterations(root)
    chosen = pointer(root, notices) if found else None
    if step is not None:
        return [step]
    if chosen is None:
        return found
    if chosen not in found:
        notices.append(f"{POINTER} names iteration {chosen}, which is not there")
        return found
    return [chosen, *(n for n in found if n != chosen)]


def pointer(root: Path, notices: list[str]) -> int | None:
    """The iteration the pointer names."""
    try:
        text = read_plain(root / POINTER, _POINTER_BYTES).strip()
    except FileNotFoundError:
        notices.append(f"{POINTER} is missing")
        return None
    except OSError as error:
        notices.append(f"{POINTER} cannot be read: it {error.strerror}")
        return None
    if not re.fullmatch(rb"\d{1,15}", text):
        notices.append(f"{POINTER} holds {text[:40]!r} instead of an iteration")
        return None
    return int(text)
