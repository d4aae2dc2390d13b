"""Which checkpoint of a folder to load and which to keep, as rank 0 sees the folder."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.checkpoint.manifest import NAME, Manifest, read_manifest, verify_sizes
from megatron_lite.config.errors import CheckpointError, StorageError
from megatron_lite.storage.reading import read_plain

POINTER = "latest_checkpointed_iteration.txt"
_FOLDER = re.compile(r"iter_(\d{7,15})", re.ASCII)
_POINTER_BYTES = 1 << 10


@dataclass(frozen=True, slots=True)
class Keep:
    """Which older checkpoints stay: the newest `last` and those of every `every`-th iteration.

    last None: all.
    """

    last: int | None = None
    every: int | None = None

    def removable(self, iterations: Sequence[int], newest: int) -> list[int]:
        """Those to remove after `newest` is complete; iterations are newest first."""
        if self.last is None:
            return []
        old = [n for n in iterations if n != newest][max(self.last - 1, 0) :]
        return [n for n in old if self.every is None or n % self.every]


KEEP_ALL = Keep()


def folder_of(root: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return root / f"iter_{iteration:07d}"


def iterations(root: Path) -> list[int]:
    """Iterations of all checkpoint folders, newest first, intact or not; links are none."""
    return [n for n, entry in _named(root) if entry.is_dir() and not entry.is_symlink()]


def _named(root: Path) -> list[tuple[int, Path]]:
    """What bears the name of a checkpoint, newest first."""
    names = [_FOLDER.fullmatch(name) for name in names_in(root)]
    found = [(int(name[1]), root / name[0]) for name in names if name]
    return sorted(((n, path) for n, path in found if folder_of(root, n) == path), reverse=True)


def names_in(root: Path) -> list[str]:
    """What lies in the folder; nothing where there is none, StorageError where it cannot be read."""
    try:
        return os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(
            f"{root} cannot be looked into: {error.strerror} - ask for permission to read the folder "
            "and to enter those above it, or give another one"
        ) from error


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


def manifest_of(folder: Path, iteration: int) -> Manifest:
    """The manifest of that iteration's folder; raises CheckpointError where it is another's."""
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link: a checkpoint's bytes lie in its run folder")
    manifest = read_manifest(folder)
    if manifest.iteration != iteration:
        raise CheckpointError(
            f"{folder / NAME} is that of iteration {manifest.iteration}: the folder was renamed"
        )
    return manifest


def newer(root: Path, loaded: int) -> list[str]:
    """A line where a newer checkpoint than the pointer's choice is complete."""
    for iteration in iterations(root):
        if iteration <= loaded:
            break
        folder = folder_of(root, iteration)
        with contextlib.suppress(CheckpointError):
            verify_sizes(folder, manifest_of(folder, iteration))
            return [
                f"{POINTER} names iteration {loaded}, and it is taken, but {folder.name} is complete "
                f"and newer: --ckpt-step {iteration} takes that one (a crash just before the pointer "
                "was written leaves it so, and somebody who went back)"
            ]
    return []
