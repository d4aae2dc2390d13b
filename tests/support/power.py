"""A disk whose power is cut: what was not synced is lost, torn or kept, as a seed decides.

Names follow a journal in order, as file systems keep it: some prefix of the renames, creations and
removals since the last sync of their folder is on the disk, what came later is undone.  Of a file,
bytes after its last fsync are cut off anywhere, or there and zero.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from megatron_lite.storage.disk import Operation, _Result
from megatron_lite.storage.faults import FaultyDisk

NAMES = ("create", "rename", "remove", "remove_tree")


@dataclass
class Pending:
    """A change of names that no sync has made sure; kept: a copy of what it hid or removed."""

    operation: Operation
    kept: Path | None

    @property
    def folder(self) -> Path:
        """The folder whose sync makes it sure."""
        return (self.operation.target or self.operation.path).parent

    def undo(self) -> None:
        """As if it had never happened."""
        path, target = self.operation.path, self.operation.target
        if self.operation.kind == "create":
            path.unlink(missing_ok=True)
        elif self.operation.kind == "rename" and target is not None:
            shutil.move(target, path)
        hidden = target or path
        if self.kept is not None and not hidden.exists():
            copy(self.kept, hidden)


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


class PowerCutDisk(FaultyDisk):
    """Crashes at operation `fail_at`; `cut` then makes of the folder what a power cut leaves.

    attic: a folder of its own for copies.
    """

    def __init__(self, *, fail_at: int, attic: Path, tear: bool = True) -> None:
        super().__init__(fail_at=fail_at, crash="raise", tear=tear)
        self.attic = attic
        self.synced: dict[Path, int] = {}
        self.pending: list[Pending] = []

    def _operate(self, operation: Operation, action: Callable[[], _Result]) -> _Result:
        kept = self._keep(operation) if not self.failed else None
        result = super()._operate(operation, action)
        self._note(operation, kept)
        return result

    def _keep(self, operation: Operation) -> Path | None:
        hidden = operation.target or operation.path
        if operation.kind not in ("rename", "remove", "remove_tree") or not hidden.exists():
            return None
        kept = self.attic / str(len(self.operations))
        copy(hidden, kept)
        return kept

    def _note(self, operation: Operation, kept: Path | None) -> None:
        path = operation.path
        if operation.kind in NAMES:
            self.pending.append(Pending(operation, kept))
        if operation.kind == "create":
            self.synced[path] = 0
        elif operation.kind == "fsync":
            self.synced[path] = path.stat().st_size
        elif operation.kind == "reopen":
            self.synced[path] = min(self.synced.get(path, 1 << 62), path.stat().st_size)
        elif operation.kind == "rename" and operation.target is not None:
            target = operation.target
            moved = {p: n for p, n in self.synced.items() if p == path or path in p.parents}
            for old, size in moved.items():
                del self.synced[old]
                self.synced[target / old.relative_to(path)] = size
        elif operation.kind == "sync_folder":
            self.pending = [p for p in self.pending if p.folder != path]

    def cut(self, random: Random) -> None:
        """What is on the disk when the machine comes back."""
        for path, synced in self.synced.items():
            if not path.is_file():
                continue
            size = path.stat().st_size
            if size > synced:
                left = random.choice([synced, random.randint(synced, size), size])
                zeros = random.randint(synced, left) if random.random() < 0.5 else left
                with path.open("r+b") as file:
                    file.truncate(zeros)
                    file.truncate(left)
        for change in reversed(self.pending[random.randint(0, len(self.pending)) :]):
            change.undo()
