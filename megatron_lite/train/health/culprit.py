"""Where a bad value came first: each rank's own suspect, and the first of all ranks.

    weights ──▶ outputs of layers, in order of forward ──▶ gradients, from the head down

The earlier in this order, the closer to the cause; everything after it is a consequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_lite.parallel.collectives import all_gather
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import NamedSlice

_NUMBERS, _BYTES = 4, 384
"""A suspect on its way to the others: its order as int64 and its text in UTF-8."""

WEIGHT, OUTPUT, GRADIENT, SUMMED = range(4)
"""When in a step something became bad."""

HEAD = 1 << 20
"""Position of what comes after the last block."""


@dataclass(frozen=True, slots=True, order=True)
class NonFiniteOrigin:
    """Something bad: order tells which of two came first, text names it, its rank and its samples."""

    order: tuple[int, ...]
    text: str


def position(name: str) -> int:
    """Where a parameter, its state or a module stands in the forward: embedding, block numbers, head."""
    block = re.search(r"(?:^|\.)blocks\.(\d+)(?:\.|$)", name)
    if block:
        return int(block[1])
    return -1 if "embedding" in name.split(".") else HEAD


def deepest(names: Sequence[str]) -> str:
    """The last in the forward of names in their order of definition: where backward comes first."""
    return max(enumerate(names), key=lambda entry: (position(entry[1]), entry[0]))[1]


def earliest_over_ranks(
    found: NonFiniteOrigin | None, ctx: ParallelContext
) -> tuple[NonFiniteOrigin | None, list[int]]:
    """The first suspect of any rank, and the ranks that have one.  Collective over the world."""
    row = torch.zeros(1 + _NUMBERS + _BYTES // 8, dtype=torch.int64)
    if found is not None:
        row[0] = 1
        row[1 : 1 + len(found.order)] = torch.tensor(found.order)
        text = found.text.encode()[:_BYTES].ljust(_BYTES, b"\0")
        row[1 + _NUMBERS :] = torch.from_numpy(np.frombuffer(text, dtype=np.int64).copy())
    rows = all_gather(row.to(ctx.device), ctx.world).view(ctx.world_size, -1).cpu()
    suspects = {rank: _read(one) for rank, one in enumerate(rows) if one[0]}
    return min(suspects.values(), default=None), sorted(suspects)


def _read(row: torch.Tensor) -> NonFiniteOrigin:
    text = row[1 + _NUMBERS :].numpy().tobytes().rstrip(b"\0")
    return NonFiniteOrigin(tuple(row[1 : 1 + _NUMBERS].tolist()), text.decode(errors="replace"))


def bad_tensors(slices: Iterable[NamedSlice]) -> list[str]:
    """Names of those that hold a value that is not finite."""
    return [piece.name for piece in slices if not torch.isfinite(piece.data).all()]


def name_samples(samples: torch.Tensor) -> str:
    """`samples 4, 5`, the numbers of one micro batch in the training stream."""
    numbers = samples.tolist()
    shown = ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
    return f"sample{'s' if len(numbers) > 1 else ''} {shown}"


def name_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 1, 3`."""
    listed = list(ranks)
    shown = ", ".join(map(str, listed[:8])) + (" ..." if len(listed) > 8 else "")
    return f"rank {shown}" if len(listed) == 1 else f"ranks {shown}"
