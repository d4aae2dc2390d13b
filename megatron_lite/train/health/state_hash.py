"""--print-state-hash: one number for the whole state, the same in every parallel layout."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_lite.config.sections.lora import NF4_BLOCK
from megatron_lite.models.packing import ABSMAX, CODES
from megatron_lite.parallel.collectives import all_reduce
from megatron_lite.parallel.shard import DTYPES, MASTER, STATE_DTYPES, NamedSlice
from megatron_lite.train.run import Run


def state_hash(run: Run) -> str:
    """sha256 over names, shapes and bits of all weights, masters and optimizer tensors.

    Tensors come whole, by sorted canonical name, without the vocabulary's padding, so that the
    layout has no say in it.  Collective over the world; one whole tensor at a time is in memory.
    """
    digest = hashlib.sha256()
    pieces: dict[str, list[NamedSlice]] = defaultdict(list)
    for piece in _owned(run):
        # of what replicas hold alike, the first's
        if run.ctx.replicas.rank == 0 or not piece.replicated:
            pieces[piece.name].append(piece)
    for name, shape, dtype in _tensors(run):
        whole = _whole(pieces[name], shape, dtype, run)
        digest.update(f"{name} {dtype} {list(shape)}\n".encode())
        digest.update(whole.cpu().numpy().tobytes())
    return digest.hexdigest()


def _owned(run: Run) -> Iterator[NamedSlice]:
    yield from run.engine.weights(owned=True)
    yield from run.engine.state(owned=True)
    yield from run.bits()


def _tensors(run: Run) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, global shape and format of every tensor of the state; equal on all ranks."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    updates = run.engine.progress().steps
    for spec in run.blueprint.parameters:
        vocabulary = spec.tensor.vocabulary
        shape = (run.context.vocab_size, *spec.shape[1:]) if vocabulary else spec.shape
        storage = spec.tensor.storage
        if storage == "nf4":
            for name, share, dtype in ((CODES, 2, torch.uint8), (ABSMAX, NF4_BLOCK, torch.float32)):
                found[f"{spec.name}.{name}"] = (shape[0], shape[1] // share), dtype
            continue
        dtype = run.context.dtype if storage is None else DTYPES[storage]
        found[spec.name] = shape, dtype
        if dtype != torch.float32:
            found[MASTER + spec.name] = shape, torch.float32
        for state in run.blueprint.states(spec.tensor, updates):
            found[f"{state.name}.{spec.name}"] = state.of(shape), STATE_DTYPES[state.storage]
    return [(name, *form) for name, form in sorted(found.items())]


def _whole(
    pieces: list[NamedSlice], shape: tuple[int, ...], dtype: torch.dtype, run: Run
) -> Tensor:
    """The bits of a whole tensor as integers, put together from the ranks' primary copies.

    Integers, because a sum of floats would lose the sign of zero; int32, because gloo has no int16.
    """
    bits = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[dtype.itemsize]
    whole = torch.zeros(shape, dtype=torch.int32, device=run.ctx.device)
    for piece in pieces:
        box = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.data.shape, strict=True))
        whole[box] = piece.data.detach().contiguous().view(bits).to(torch.int32)
    return all_reduce(whole, run.ctx.world).to(bits)
