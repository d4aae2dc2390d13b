"""Filling a rank's slices from the stored pieces of any other layout: intersections of boxes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_lite.checkpoint.manifest import Manifest, StoredPiece
from megatron_lite.config.errors import CheckpointError
from megatron_lite.parallel.shard import NamedSlice

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
            missing = wanted.data.numel()
            for piece in manifest.tensors[wanted.name].pieces:
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
                try:
                    wanted.data[here] = opened[piece.file].get_slice(piece.key)[there]
                except (SafetensorError, RuntimeError, IndexError) as error:
                    path = folder / piece.file
                    raise CheckpointError(f"{path}: {piece.key} cannot be read: {error}") from error
                missing -= math.prod(b - a for a, b in box)
            if missing:
                raise CheckpointError(
                    f"{folder} holds only a part of {wanted.name}: {missing} elements are missing"
                )


def _open(stack: ExitStack, path: Path) -> Any:
    try:
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
