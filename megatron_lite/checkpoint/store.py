"""Save and load: written aside, hashed, made visible by one rename, the pointer last.

<save>/iter_0000100/weights-00000.safetensors      slices of rank 0
                    optimizer-00000.safetensors    masters and moments of rank 0
                    ...                            other ranks
                    tokenizer/vocab.json ...       the tokenizer's files
                    manifest.json                  names, boxes, sizes, hashes, progress, config
<save>/latest_checkpointed_iteration.txt           100
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.agreement import Agreement
from megatron_lite.checkpoint.boxes import check_fit, fill
from megatron_lite.checkpoint.choice import (
    KEEP_ALL,
    POINTER,
    Keep,
    folder_of,
    iterations,
    manifest_of,
    names_in,
    newer,
    to_try,
)
from megatron_lite.checkpoint.manifest import (
    NAME,
    TOKENIZER,
    Manifest,
    StoredPiece,
    StoredTensor,
    verify_files,
)
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.snapshot import UNKNOWN, Origin, Snapshot, share
from megatron_lite.checkpoint.tensor_file import (
    SAFETENSORS_NAMES,
    Written,
    write_bytes,
    write_tensors,
)
from megatron_lite.config.errors import CheckpointError, NumericsError, StorageError
from megatron_lite.parallel.collectives import MAX, all_reduce, barrier
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import NamedSlice
from megatron_lite.storage.disk import Disk, write_atomically

_REPLACED = ".replaced.partial"
_PROBE = ".can-every-rank-see-this.partial"
_SEEN_WITHIN_SECONDS = 30.0  # network file systems show another node's new names late


@dataclass(frozen=True, slots=True)
class Saved:
    """A finished save: where, how many bytes over all ranks, seconds, and what else went wrong."""

    iteration: int
    folder: Path
    bytes: int
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


def _go_on(point: str) -> None:
    """Default: no callback at the named points of a save."""


def _nobody_else() -> None:
    """Default: the folder has no lock to check."""


@dataclass(slots=True)
class Store:
    """The checkpoints of one folder.  Collective: every rank of ctx.world makes the same calls.

    at: called with load, save.begin, save.after_share, save.before_complete and save.end.
    still_ours: raises StorageError where the folder is not; rank 0 asks before anything appears.
    thread: how the ranks agree where not the main thread but one beside the step makes the calls.
    meet, seen: for a start, whose ranks may read for long: meet waits for the others without a
    time-out under a name used once, seen is told the bytes this rank has verified, of how many.
    """

    root: Path
    ctx: ParallelContext
    disk: Disk = field(default_factory=Disk)
    at: Callable[[str], None] = _go_on
    thread: Agreement | None = None
    still_ours: Callable[[], None] = _nobody_else
    meet: Callable[[str], None] = _go_on
    seen: Callable[[int, int], None] = lambda done, total: None

    @property
    def ranks(self) -> Agreement:
        """How the ranks agree."""
        return self.thread or Agreement.of_the_step(self.ctx)

    def prepare(self, snapshot: Snapshot) -> None:
        """Find out at the start, not hours later, whether snapshots like this can be saved.

        Makes the folder, writes and removes a file, which every rank must see, compares the free
        space with the size, and clears away what a crash left half-written.  Raises StorageError
        on every rank alike.
        """
        total = self.ranks.total(snapshot.bytes)
        writing = f"write to {self.root}"
        with self.ranks.together(writing, self._remove_probe):
            if self.ctx.rank == 0:
                self.disk.make_folder(self.root)
                self.still_ours()
                self._finish_replacement()
                for stale in self.root.glob(".*.partial"):
                    self.disk.remove_tree(stale)
                with self.disk.create(self.root / _PROBE) as file:
                    file.write(b"yes")
                    file.fsync()
                self._require_space(total)
        with self.ranks.together(writing, self._remove_probe):
            self._wait_for(self.root / _PROBE)
        with self.ranks.together(writing):
            self._remove_probe()

    def _remove_probe(self) -> None:
        if self.ctx.rank == 0:
            self.disk.remove(self.root / _PROBE)

    def _wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + _SEEN_WITHIN_SECONDS
        while not path.exists():
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{path} was written by another rank and is not seen here: --save must name a "
                    "folder on a file system that all nodes share"
                )
            time.sleep(0.05)

    def snapshot(
        self,
        iteration: int,
        *,
        weights: Iterable[NamedSlice],
        optimizer: Iterable[NamedSlice],
        progress: Progress | None = None,
        config: dict[str, Any] | None = None,
        origin: Origin = UNKNOWN,
    ) -> Snapshot:
        """This rank's part of a checkpoint, its tensors where they lie.

        weights, optimizer: this rank's primary copies; they are dealt out over dp, whose ranks
        hold the same.  origin: what the run reads.
        """
        return Snapshot(
            iteration=iteration,
            shares={"weights": share(weights, self.ctx), "optimizer": share(optimizer, self.ctx)},
            progress=progress or Progress(),
            config=config or {},
            origin=origin,
        )

    def save(self, snapshot: Snapshot, keep: Keep = KEEP_ALL) -> Saved:
        """Write a checkpoint; on any rank's failure all ranks raise and the older ones stay.

        NumericsError where a value is not finite: whatever is kept, and what retention counts on, is.
        """
        began = time.monotonic()
        final = self.folder(snapshot.iteration)
        partial = self.root / f".{final.name}.partial"
        total = self.ranks.total(snapshot.bytes)
        writing = f"write to {self.root}"

        def undo() -> None:
            if self.ctx.rank == 0:
                self.disk.remove_tree(partial)

        with self.ranks.together(writing, undo):
            self.at("save.begin")
            if self.ctx.rank == 0:
                self.still_ours()
                self.disk.remove_tree(partial)
                self._require_space(total)
                self.disk.make_folder(partial)
        with self.ranks.together(writing, undo):
            bad = self._write_share(partial, snapshot)
            self.at("save.after_share")
        bad = self.ranks.told(bad)
        if bad is not None:
            undo()
            raise NumericsError(
                f"iteration {snapshot.iteration} is not kept: {bad} - the older checkpoints in "
                f"{self.root} are untouched: resume from one of them, with a lower --lr if it happens again"
            )
        with self.ranks.together(writing, undo):
            if self.ctx.rank == 0:
                self.at("save.before_complete")
                self._complete(partial, final, snapshot)
        self.at("save.end")
        warnings = self._retain(keep, snapshot.iteration)
        return Saved(snapshot.iteration, final, total, time.monotonic() - began, tuple(warnings))

    def folder(self, iteration: int) -> Path:
        """Where the checkpoint of an iteration lies."""
        return folder_of(self.root, iteration)

    def _require_space(self, total: int) -> None:
        free = self.disk.free_bytes(self.root)
        needed = int(total * 1.02) + (1 << 20)  # the manifest and the folder's own blocks
        if free < needed:
            raise StorageError(
                f"{self.root} has {free} bytes free, but a checkpoint needs {needed} bytes "
                f"({needed / 1e9:.3f} GB) - free some space or choose another --save; the older "
                "checkpoints are untouched"
            )

    def _write_share(self, partial: Path, snapshot: Snapshot) -> str | None:
        """This rank's files, and last the list of them, whose presence says that they are whole.

        Returns what in them is not finite, in words.
        """
        bad: list[str] = []
        self._wait_for(partial)
        part: dict[str, Any] = {"files": {}, "tensors": []}
        for kind, slices in snapshot.shares.items():
            if not slices:
                continue
            file = f"{kind}-{self.ctx.rank:05d}.safetensors"
            keys = {f"{i}:{s.name}": s for i, s in enumerate(slices)}
            written = write_tensors(
                partial / file, {k: s.data for k, s in keys.items()}, self.disk, not_finite=bad
            )
            part["files"][file] = dataclasses.astuple(written)
            part["tensors"] += [
                [
                    s.name,
                    s.shape,
                    SAFETENSORS_NAMES[s.data.dtype],
                    file,
                    key,
                    s.offset,
                    tuple(s.data.shape),
                ]
                for key, s in keys.items()
            ]
        if self.ctx.rank == 0:
            for name, data in snapshot.origin.tokenizer_files.items():
                file = f"{TOKENIZER}/{name}"
                self.disk.make_folder(partial / TOKENIZER)
                written = write_bytes(partial / file, data, self.disk)
                part["files"][file] = dataclasses.astuple(written)
        write_bytes(self._listing(partial, self.ctx.rank), json.dumps(part).encode(), self.disk)
        if not bad:
            return None
        names = ", ".join(key.partition(":")[2] for key in bad[:3])
        more = f" and {len(bad) - 3} more" if bad[3:] else ""
        return f"{names}{more} of rank {self.ctx.rank} hold values that are not finite"

    def _listing(self, partial: Path, rank: int) -> Path:
        return partial / f"part-{rank:05d}.json"

    def _complete(self, partial: Path, final: Path, snapshot: Snapshot) -> None:
        files: dict[str, Written] = {}
        tensors: dict[str, StoredTensor] = {}
        for rank in range(self.ctx.world_size):
            listing = self._listing(partial, rank)
            self._wait_for(listing)
            part = json.loads(listing.read_bytes())
            files |= {name: Written(*written) for name, written in part["files"].items()}
            for name, shape, dtype, *place in part["tensors"]:
                piece = StoredPiece(place[0], place[1], tuple(place[2]), tuple(place[3]))
                before = tensors[name].pieces if name in tensors else ()
                tensors[name] = StoredTensor(tuple(shape), dtype, (*before, piece))
            self.disk.remove(listing)
        manifest = Manifest(
            snapshot.iteration,
            snapshot.progress,
            snapshot.config,
            files,
            tensors,
            tokenizer=snapshot.origin.tokenizer,
            data=snapshot.origin.data,
        )
        write_bytes(partial / NAME, manifest.to_bytes(), self.disk)
        for folder in {(partial / name).parent for name in (*files, NAME)}:
            self.disk.sync_folder(folder)
        self.still_ours()  # again: a large save takes long enough to lose the folder meanwhile
        if os.path.lexists(final):  # the same iteration again: the new one takes its place
            replaced = self.root / f".{final.name}{_REPLACED}"
            self.disk.remove_tree(replaced)
            self.disk.rename(final, replaced)  # a rename cannot replace a folder that holds files
            self.disk.rename(partial, final)
            self.disk.remove_tree(replaced)
        else:
            self.disk.rename(partial, final)
        self.disk.sync_folder(self.root)
        write_atomically(self.root / POINTER, f"{snapshot.iteration}\n".encode(), self.disk)

    def _retain(self, keep: Keep, newest: int) -> list[str]:
        """Remove what `keep` does not keep, once the newest reads back as written; what went wrong.

        A checkpoint that cannot be removed is no failure of the save: the run continues.
        """
        removable = keep.removable(self.iterations(), newest) if self.ctx.rank == 0 else []
        if not self.ranks.any(bool(removable)):
            return []
        problem, _ = self._verify(newest)
        if problem is not None:
            raise StorageError(
                f"checkpoint {newest} does not read back as it was written: {problem} - look at "
                "the disk; no older checkpoint was removed"
            )
        warnings = []
        for iteration in removable:
            folder = self.folder(iteration)
            aside = self.root / f".{folder.name}.removed.partial"  # never a folder half removed
            try:
                self.disk.remove_tree(aside)
                self.disk.rename(folder, aside)
                self.disk.remove_tree(aside)
            except StorageError as error:
                warnings.append(f"an older checkpoint could not be removed: {error}")
        return warnings

    def iterations(self) -> list[int]:
        """Iterations of all checkpoint folders, newest first, intact or not."""
        return iterations(self.root)

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
            self.at("load")
            problem, manifest = self._verify(iteration)
            if problem is None:
                if step is None and iteration == candidates[0] and self.ctx.rank == 0:
                    notices += newer(self.root, iteration)
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
        with self.ranks.together(f"look into {self.root}"):
            if self.ctx.rank == 0:
                self._finish_replacement()
                found = to_try(self.root, step, notices)
        # by all_reduce, which needs one shape on all ranks: 64 at most, older ones are not tried
        limit = 64
        listed = torch.full((limit,), -1, dtype=torch.int64, device=self.ctx.device)
        if self.ctx.rank == 0:
            listed[: len(found[:limit])] = torch.tensor(found[:limit], dtype=torch.int64)
        all_reduce(listed, self.ctx.world, MAX)
        return [n for n in listed.tolist() if n >= 0]

    def _finish_replacement(self) -> None:
        """Put back a folder that a crash caught between the two renames of its replacement."""
        for name in names_in(self.root):
            if not (name.startswith(".iter_") and name.endswith(_REPLACED)):
                continue
            aside = self.root / name
            final = self.root / name.removeprefix(".").removesuffix(_REPLACED)
            if aside.is_symlink() or os.path.lexists(final):
                self.disk.remove_tree(aside)
            else:
                self.disk.rename(aside, final)

    def _verify(self, iteration: int) -> tuple[str | None, Manifest | None]:
        """What is wrong with it, in the words of the first rank that found something, on all ranks."""
        folder = self.folder(iteration)
        problem, manifest = None, None
        try:
            manifest = manifest_of(folder, iteration)
            shares = self.ctx.world_size
            verify_files(folder, manifest, share=self.ctx.rank, shares=shares, seen=self.seen)
        except CheckpointError as error:
            problem = str(error)
        self.meet(f"verified-{iteration}")
        return self.ranks.told(problem), manifest

    def load(self, manifest: Manifest, slices: Sequence[NamedSlice]) -> None:
        """Fill the slices' data in place.

        Raises CheckpointError, before anything is changed, listing all tensors that do not fit.
        """
        self.load_in_turn(manifest, [slices])

    def load_in_turn(self, manifest: Manifest, groups: Iterable[Sequence[NamedSlice]]) -> None:
        """Likewise, a group after the other: the next is asked for when one is filled.

        Ranks may have groups of their own, and as many as they like.
        """
        folder = self.folder(manifest.iteration)
        for slices in groups:
            wanted = [s for s in slices if s.data.numel()]
            check_fit(wanted, manifest, folder)
            fill(wanted, manifest, folder)
        self.meet("filled")
        barrier(self.ctx.world)
