"""--check-replicas: all replicas of a tensor must be equal to the last bit.

    dp     all weights; without the distributed optimizer their masters and moments, too
    tp     what is not cut over it: norms, row biases, positions; with masters and moments
    tied   the token table of the first and of the last stage; with masters and moments
    pp     what all stages share: learned rotary frequencies; with masters and moments

Each copy becomes one integer; two all-reduces per axis tell whether all agree.  Only where they do
not are the integers gathered, to say who differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_lite.config.errors import DistributedError
from megatron_lite.parallel.collectives import MAX, MIN, all_gather, all_reduce
from megatron_lite.parallel.context import Axis
from megatron_lite.parallel.shard import NamedSlice
from megatron_lite.train.health.culprit import (
    NonFiniteOrigin,
    earliest_over_ranks,
    name_ranks,
    position,
)
from megatron_lite.train.run import Run

_ODD = 0x9E3779B97F4A7C16 - (1 << 64)
"""2^64 over the golden ratio, made even (so that a multiple plus one is odd), as a signed number."""

_CHUNK = 1 << 22
"""Elements hashed at a time: an int64 copy of a whole table would not fit beside it."""


def check_replicas(run: Run) -> None:
    """Raise DistributedError on all ranks alike where two copies of a tensor differ.  Collective."""
    found: NonFiniteOrigin | None = None
    for number, (axis, copies) in enumerate(_copies(run)):
        suspect = None
        if axis.size > 1 and copies:
            suspect = _differing(axis, copies, number, run.ctx.device)
        found = found or suspect
    first, ranks = earliest_over_ranks(found, run.ctx)
    if first is not None:
        raise DistributedError(
            f"iteration {run.progress.step}: {first.text} ({len(ranks)} ranks see a difference) - "
            "the memory or device of one of them is at fault: test those nodes and start again "
            "without them; checkpoints since the last check that passed may hold the error"
        )


def bits_hash(tensor: Tensor) -> Tensor:
    """An int64 scalar that changes when any bit of the tensor does, or two unequal elements swap.

    The sum of every element's bits times an odd number of its place, modulo 2^64.
    """
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().view(-1).view(integer[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start, start + part.numel(), device=tensor.device)
        total += (part * (place * _ODD + 1)).sum()
    return total


def _copies(run: Run) -> Iterator[tuple[Axis, list[NamedSlice]]]:
    """Each axis, and this rank's tensors that every rank of it must hold alike, in one order."""
    state = list(run.engine.state(owned=False))
    weights = [*run.engine.weights(owned=False), *run.bits()]
    yield run.ctx.replicas, [s for s in (*weights, *state) if s.replicated]
    for axis, held in (
        (run.ctx.tp, [local for local in run.parameters if local.tp_dim is None]),
        (run.ctx.tied, [local for local in run.parameters if local.tied_across_stages]),
        (run.ctx.pp, [local for local in run.parameters if local.late]),
    ):
        names = {piece.name for local in held for piece in local.pieces}
        theirs = [s for s in state if s.name.partition(".")[2] in names]
        yield axis, [s for s in weights if s.name in names] + theirs


def _differing(
    axis: Axis, copies: Sequence[NamedSlice], number: int, device: torch.device
) -> NonFiniteOrigin | None:
    """The first tensor whose copies differ along the axis, and on which ranks."""
    mine = torch.stack([bits_hash(piece.data).to(device) for piece in copies])  # some from the host
    low, high = all_reduce(mine.clone(), axis, MIN), all_reduce(mine.clone(), axis, MAX)
    wrong = torch.nonzero(low != high).flatten().tolist()  # waits for the device
    if not wrong:
        return None
    hashes = all_gather(mine, axis).view(axis.size, -1).cpu()
    index = wrong[0]
    column = hashes[:, index].tolist()
    (common, votes), *_ = Counter(column).most_common()
    others = [rank for rank, value in zip(axis.ranks, column, strict=True) if value != common]
    alike = [rank for rank in axis.ranks if rank not in others]
    name = copies[index].name
    if votes > len(column) // 2:
        who = f"{name_ranks(others)} of {axis.name} differ from {name_ranks(alike)}"
    else:
        who = f"{name_ranks(axis.ranks)} of {axis.name} differ, and no majority tells who is right"
    return NonFiniteOrigin(
        (number, position(name), index),
        f"the copies of {name} have drifted apart: {who} (of {len(wrong)} such tensors)",
    )
