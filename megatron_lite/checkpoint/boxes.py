"""Filling a rank's slices from the stored pieces of any other layout: intersections of boxes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lite.checkpoint.manifest import Manifest, StoredPiece
from megatron_lite.config.errors import CheckpointError
from megatron_lite.parallel.shard import NamedSlice
from megatron_lite.storage.reading import require_plain

_SHOWN = 20  # mismatches listed in one message


def check_fit(slices: Iterable[NamedSlice], manifest: Manifest, folder: Path) -> None:
    """Raise one CheckpointError listing every tensor that is missing or has another shape."""
    wrong = []
    for wanted in slices:
        stored = manifest.tensors.get(wanted.name)
        if stored is None:
            wrong.append(f"{wanted.name}: not in the checkpoint")
        elif stored.shape != wanted.shape:
            wrong.append(f"{wanted.name}: {list(stored.shape)} there, {list(wanted.shape)} here")
    if wrong:
        more = f"\n  ... and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckpointError(
            f"{folder} does not fit this model ({len(wrong)} tensors): check the model's sizes and "
            "--vocab-file, or load another folder\n  " + "\n  ".join(wrong[:_SHOWN]) + more
        )


@torch.no_grad()
def fill(slices: Iterable[NamedSlice], manifest: Manifest, folder: Path) -> None:
    """Copy stored pieces into the slices' data, in place, converting the number format."""
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        for wanted in slices:
            covered = _Covered(wanted, folder)
            stored = manifest.tensors[wanted.name]
            for piece in stored.pieces:
                box = _overlap(wanted, piece)
                if box is None:
                    continue
                if piece.file not in opened:
                    opened[piece.file] = _open(stack, folder / piece.file)
                there = tuple(
                    slice(a - o, b - o) for (a, b), o in zip(box, piece.offset, strict=True)
                )
                here = tuple(
                    slice(a - o, b - o) for (a, b), o in zip(box, wanted.offset, strict=True)
                )
                covered.add(here)
                try:
                    kept = opened[piece.file].get_slice(piece.key)
                    _require_form(kept, piece, stored.dtype, folder)
                    wanted.data[here] = kept[there]
                except (SafetensorError, RuntimeError, IndexError) as error:
                    path = folder / piece.file
                    raise CheckpointError(f"{path}: {piece.key} cannot be read: {error}") from error
            covered.require_all()


class _Covered:
    """Which elements of a slice were filled: each must be, and by one piece only."""

    def __init__(self, wanted: NamedSlice, folder: Path) -> None:
        self._wanted, self._folder = wanted, folder
        self._seen: Tensor | None = None
        self._missing = wanted.data.numel()

    def add(self, box: tuple[slice, ...]) -> None:
        """Note a piece's box; raises CheckpointError where it meets an earlier one's."""
        size = math.prod(edge.stop - edge.start for edge in box)
        if size < self._wanted.data.numel():  # one piece for all needs no bookkeeping
            if self._seen is None:
                self._seen = torch.zeros(self._wanted.data.shape, dtype=torch.bool)
            if self._seen[box].any():
                raise CheckpointError(
                    f"{self._folder}: two pieces of {self._wanted.name} claim the same elements"
                )
            self._seen[box] = True
        self._missing -= size

    def require_all(self) -> None:
        """Raise CheckpointError where elements were left out."""
        if self._missing:
            raise CheckpointError(
                f"{self._folder} holds only a part of {self._wanted.name}: "
                f"{self._missing} elements are missing"
            )


def _require_form(kept: Any, piece: StoredPiece, dtype: str, folder: Path) -> None:
    """The file must hold what the manifest says: a wrong format would convert without a word."""
    found = (kept.get_dtype(), tuple(kept.get_shape()))
    if found != (dtype, piece.lengths):
        raise CheckpointError(
            f"{folder / piece.file}: {piece.key} is {found[0]} {list(found[1])}, its manifest says "
            f"{dtype} {list(piece.lengths)}"
        )


def _open(stack: ExitStack, path: Path) -> Any:
    try:
        require_plain(path, path.stat())  # a named pipe would be waited for
        return stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be opened: {error}") from error


def _overlap(wanted: NamedSlice, piece: StoredPiece) -> list[tuple[int, int]] | None:
    """The common box in global coordinates, None where it is empty."""
    box = []
    for dim, length in enumerate(wanted.data.shape):
        low = max(wanted.offset[dim], piece.offset[dim])
        high = min(wanted.offset[dim] + length, piece.offset[dim] + piece.lengths[dim])
        if low >= high:
            return None
        box.append((low, high))
    return box
