"""What tests read of any engine, by its protocol alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from megatron_lite.engines.base import Engine
from megatron_lite.engines.table import ENGINES
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import MASTER, NamedSlice

OF_EVERY_LAYOUT = tuple(name for name in ENGINES if name != "deepspeed")
"""Engines that what holds of any engine is tested of; DeepSpeed's refuses tp, pp and fp16, and is an
oracle (test_deepspeed.py)."""


def counted(owned: Iterable[NamedSlice], ctx: ParallelContext) -> Iterator[NamedSlice]:
    """Of what this rank stands for, what no replica before it holds: each box once over the world."""
    return (piece for piece in owned if ctx.replicas.rank == 0 or not piece.replicated)


def named(slices: Iterable[NamedSlice]) -> dict[str, Tensor]:
    """Canonical name -> tensor."""
    return {piece.name: piece.data for piece in slices}


def exact_weights(engine: Engine) -> dict[str, Tensor]:
    """The fp32 masters this rank holds; the weights where they are their own."""
    state = named(engine.state(owned=False))
    masters = {n.removeprefix(MASTER): t for n, t in state.items() if n.startswith(MASTER)}
    return masters or named(engine.weights(owned=False))
