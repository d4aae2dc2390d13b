"""Save and load: written aside, hashed, made visible by one rename, the pointer last.

<save>/iter_0000100/weights-00000.safetensors      slices of rank 0
                    optimizer-00000.safetensors    masters and moments of rank 0
                    ...                            other ranks
                    manifest.json                  names, boxes, sizes, hashes, progress, config
<save>/latest_checkpointed_iteration.txt           100
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.boxes import check_fit, fill
from megatron_lite.checkpoint.manifest import (
    NAME,
    Manifest,
    StoredPiece,
    StoredTensor,
    read_manifest,
    verify_files,
)
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.tensor_file import DTYPES, Written, file_bytes, write_tensors
from megatron_lite.config.errors import CheckpointError, MegatronLiteError, StorageError
from megatron_lite.parallel.collectives import MAX, SUM, all_reduce, barrier
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import NamedSlice
from megatron_lite.storage.disk import Disk, temporary_name, write_atomically

POINTER = "latest_checkpointed_iteration.txt"
_FOLDER = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True, slots=True)
class Saved:
    """A finished save: where, and how many bytes over all ranks."""

    folder: Path
    bytes: int


def _go_on(point: str) -> None:
    """What happens at the named points of a save, unless a test wants something to."""


@dataclass(slots=True)
class Store:
    """The checkpoints of one folder.  Collective: every rank of ctx.world makes the same calls.

    at: called with save.begin, save.after_share, save.before_complete and save.end.
    """

    root: Path
    ctx: ParallelContext
    disk: Disk = field(default_factory=Disk)
    at: Callable[[str], None] = _go_on

    def prepare(self, weights: Iterable[NamedSlice], optimizer: Iterable[NamedSlice]) -> None:
        """Find out at the start, not hours later, whether a checkpoint of these slices can be saved.

        Makes the folder, writes and removes a file, compares the free space with the size, and
        clears away what a crash left half-written.  Raises StorageError on every rank alike.
        """
        mine = {"weights": _share(weights, self.ctx), "optimizer": _share(optimizer, self.ctx)}
        total = self._total_bytes(mine)
        with self._together(None):
            if self.ctx.rank == 0:
                self.disk.make_folder(self.root)
                self._finish_replacement()
                for stale in self.root.glob(".*.partial"):
                    self.disk.remove_tree(stale) if stale.is_dir() else self.disk.remove(stale)
                probe = temporary_name(self.root / "can-this-be-written")
                with self.disk.create(probe) as file:
                    file.write(b"yes")
                    file.fsync()
                self.disk.remove(probe)
                self._require_space(total)

    def save(
        self,
        iteration: int,
        *,
        weights: Iterable[NamedSlice],
        optimizer: Iterable[NamedSlice],
        progress: Progress,
        config: dict[str, Any],
        keep_last: int | None = None,
    ) -> Saved:
        """Write a checkpoint; on any rank's failure all ranks raise and the older ones stay.

        weights, optimizer: the slices this rank stands for; they are dealt out over dp, whose
        ranks hold the same.
        """
        final = self.root / f"iter_{iteration:07d}"
        partial = self.root / f".{final.name}.partial"
        mine = {kind: _share(slices, self.ctx) for kind, slices in
                (("weights", weights), ("optimizer", optimizer))}  # fmt: skip
        total = self._total_bytes(mine)
        self.at("save.begin")
        with self._together(partial):
            if self.ctx.rank == 0:
                self._require_space(total)
                self.disk.remove_tree(partial)
                self.disk.make_folder(partial)
        with self._together(partial):
            self._write_share(partial, mine)
        self.at("save.after_share")
        with self._together(partial):
            if self.ctx.rank == 0:
                self.at("save.before_complete")
                self._complete(partial, final, iteration, progress, config)
        self.at("save.end")
        if self.ctx.rank == 0 and keep_last is not None:
            self._retain(keep_last, iteration)
        return Saved(final, total)

    def _total_bytes(self, mine: dict[str, list[NamedSlice]]) -> int:
        own = sum(file_bytes([s.data for s in slices]) for slices in mine.values())
        count = torch.tensor([own], dtype=torch.int64, device=self.ctx.device)
        return int(all_reduce(count, self.ctx.world, SUM).item())  # waits for the device

    def _require_space(self, total: int) -> None:
        free = self.disk.free_bytes(self.root)
        needed = int(total * 1.02) + (1 << 20)  # the manifest and the folder's own blocks
        if free < needed:
            raise StorageError(
                f"{self.root} has {free} bytes free, but a checkpoint needs {needed} bytes "
                f"({needed / 1e9:.3f} GB) - free some space or choose another --save; the older "
                "checkpoints are untouched"
            )

    def _write_share(self, partial: Path, mine: dict[str, list[NamedSlice]]) -> None:
        part: dict[str, Any] = {"files": {}, "tensors": []}
        for kind, slices in mine.items():
            if not slices:
                continue
            file = f"{kind}-{self.ctx.rank:05d}.safetensors"
            keys = {f"{i}:{s.name}": s for i, s in enumerate(slices)}
            written = write_tensors(partial / file, {k: s.data for k, s in keys.items()}, self.disk)
            part["files"][file] = [written.bytes, written.sha256]
            part["tensors"] += [
                [s.name, s.shape, DTYPES[s.data.dtype], file, key, s.offset, tuple(s.data.shape)]
                for key, s in keys.items()
            ]
        with self.disk.create(partial / f"part-{self.ctx.rank:05d}.json") as listing:
            listing.write(json.dumps(part).encode())

    def _complete(
        self, partial: Path, final: Path, iteration: int, progress: Progress, config: dict[str, Any]
    ) -> None:
        files: dict[str, Written] = {}
        tensors: dict[str, StoredTensor] = {}
        for listing in sorted(partial.glob("part-*.json")):
            part = json.loads(listing.read_bytes())
            files |= {name: Written(*written) for name, written in part["files"].items()}
            for name, shape, dtype, *place in part["tensors"]:
                piece = StoredPiece(place[0], place[1], tuple(place[2]), tuple(place[3]))
                before = tensors[name].pieces if name in tensors else ()
                tensors[name] = StoredTensor(tuple(shape), dtype, (*before, piece))
            self.disk.remove(listing)
        manifest = Manifest(iteration, progress, config, files, tensors)
        with self.disk.create(partial / NAME) as file:
            file.write(manifest.to_bytes())
            file.fsync()
        self.disk.sync_folder(partial)
        if final.exists():  # the same iteration once more: the new one takes its place
            replaced = self.root / f".{final.name}.replaced.partial"
            self.disk.remove_tree(replaced)
            self.disk.rename(final, replaced)
            self.disk.rename(partial, final)
            self.disk.remove_tree(replaced)
        else:
            self.disk.rename(partial, final)
        self.disk.sync_folder(self.root)
        write_atomically(self.root / POINTER, f"{iteration}\n".encode(), self.disk)

    def _retain(self, keep_last: int, newest: int) -> None:
        old = [n for n in self.iterations() if n != newest]
        for iteration in old[max(keep_last - 1, 0) :]:
            self.disk.remove_tree(self.root / f"iter_{iteration:07d}")

    @contextlib.contextmanager
    def _together(self, partial: Path | None) -> Iterator[None]:
        """Run a part of the save; if it failed on any rank, all ranks give up alike."""
        failure: MegatronLiteError | None = None
        try:
            yield
        except MegatronLiteError as error:
            failure = error
        flag = torch.tensor([failure is not None], dtype=torch.int32, device=self.ctx.device)
        if not all_reduce(flag, self.ctx.world, MAX).item():  # waits for the device
            return
        if self.ctx.rank == 0 and partial is not None:
            with contextlib.suppress(StorageError):
                self.disk.remove_tree(partial)
        if failure is None:
            failure = StorageError(
                f"another rank could not write to {self.root}: see its FATAL line; the older "
                "checkpoints are untouched"
            )
        raise failure

    def iterations(self) -> list[int]:
        """Iterations of all checkpoint folders, newest first, intact or not."""
        if not self.root.is_dir():
            return []
        names = (_FOLDER.fullmatch(entry.name) for entry in self.root.iterdir() if entry.is_dir())
        return sorted((int(m[1]) for m in names if m), reverse=True)

    def newest_intact(self, step: int | None = None) -> tuple[Manifest | None, list[str]]:
        """The manifest of the checkpoint to load, verified over all ranks, and loud lines about others.

        The pointer's choice comes first, then the newest; (None, ...) where there is no checkpoint
        folder at all.  Raises CheckpointError where there are some but none is intact, or where
        `step` was asked for and is not.
        """
        notices: list[str] = []
        candidates = self._candidates(step, notices)
        if not candidates:
            return None, notices
        for iteration in candidates:
            problem, manifest = self._verify(iteration)
            if problem is None:
                return manifest, notices
            notices.append(f"checkpoint {iteration} is not usable: {problem}")
        raise CheckpointError(
            f"{self.root} holds no intact checkpoint"
            + (f" of iteration {step}" if step is not None else "")
            + ": "
            + "; ".join(notices)
            + " - restore one from a copy, or start anew with another --load"
        )

    def _candidates(self, step: int | None, notices: list[str]) -> list[int]:
        """What rank 0 sees, so that all ranks try the same folders in the same order."""
        found: list[int] = []
        if self.ctx.rank == 0:
            self._finish_replacement()
            found = self.iterations()
            pointer = self._pointer(notices) if found else None
            if pointer is not None:
                if pointer in found:
                    found.remove(pointer)
                    found.insert(0, pointer)
                else:
                    notices.append(f"{POINTER} names iteration {pointer}, which is not there")
            if step is not None:
                found = [step]
        limit = 64  # older ones than that are not tried
        listed = torch.full((limit,), -1, dtype=torch.int64, device=self.ctx.device)
        if self.ctx.rank == 0:
            listed[: len(found[:limit])] = torch.tensor(found[:limit], dtype=torch.int64)
        all_reduce(listed, self.ctx.world, MAX)
        return [n for n in listed.tolist() if n >= 0]

    def _finish_replacement(self) -> None:
        """Put back a folder that a crash caught between the two renames of its replacement."""
        for aside in self.root.glob(".iter_*.replaced.partial"):
            final = self.root / aside.name.removeprefix(".").removesuffix(".replaced.partial")
            if final.exists():
                self.disk.remove_tree(aside)
            else:
                self.disk.rename(aside, final)

    def _pointer(self, notices: list[str]) -> int | None:
        try:
            text = (self.root / POINTER).read_bytes().strip()
        except OSError:
            notices.append(f"{POINTER} is missing")
            return None
        if not re.fullmatch(rb"\d{1,15}", text):
            notices.append(f"{POINTER} holds {text[:40]!r} instead of an iteration")
            return None
        return int(text)

    def _verify(self, iteration: int) -> tuple[str | None, Manifest | None]:
        folder = self.root / f"iter_{iteration:07d}"
        problem, manifest = None, None
        try:
            manifest = read_manifest(folder)
            verify_files(folder, manifest, share=self.ctx.rank, shares=self.ctx.world_size)
        except CheckpointError as error:
            problem = str(error)
        flag = torch.tensor([problem is not None], dtype=torch.int32, device=self.ctx.device)
        if all_reduce(flag, self.ctx.world, MAX).item() and problem is None:  # waits
            problem = "another rank found it damaged"
        return problem, manifest

    def load(self, manifest: Manifest, slices: Sequence[NamedSlice]) -> None:
        """Fill the slices' data in place.

        Raises CheckpointError, before anything is changed, listing all tensors that do not fit.
        """
        folder = self.root / f"iter_{manifest.iteration:07d}"
        wanted = [s for s in slices if s.data.numel()]
        check_fit(wanted, manifest, folder)
        fill(wanted, manifest, folder)
        barrier(self.ctx.world)


def _share(slices: Iterable[NamedSlice], ctx: ParallelContext) -> list[NamedSlice]:
    """What this rank writes: its own shards, and every dp-th slice of what all dp ranks hold."""
    filled = [s for s in slices if s.data.numel()]
    dealt = [s for s in filled if s.replicated][ctx.dp.rank :: ctx.dp.size]
    return [*dealt, *(s for s in filled if not s.replicated)]
