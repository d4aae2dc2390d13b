"""What one training step sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_lite.parallel import collectives
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import PP, TP
from tests.support.tiny import context, draw, make_batches, tiny_config

S, B, H, LAYERS = 16, 2, 32, 4
"""Of the model that is trained: sequence, micro batch, hidden size, layers."""


def traffic(
    rank: int, ranks: int, changes: dict[str, Any], device: str = "cpu"
) -> tuple[Counter[tuple[str, int]], int]:
    """(collective, bytes of the whole tensor) -> how often, on this rank in one step; its parameters."""
    size = {"train__global_batch_size": B * ranks_dp(changes, ranks)}
    config = tiny_config(**{"train__micro_batch_size": B} | size | changes)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank, device))
    batches = make_batches(config, blueprint, run.ctx.dp.rank, 0)
    seen: Counter[tuple[str, int]] = Counter()
    reduce, gather, scatter = dist.all_reduce, collectives._gather_into, collectives._scatter_into
    send = dist.isend

    def count(name: str, call: Callable[..., Any], whole: int) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            seen[name, arguments[whole].numel() * arguments[whole].element_size()] += 1
            return call(*arguments, **keywords)

        return counted

    dist.all_reduce = count("all-reduce", reduce, 0)
    collectives._gather_into = count("all-gather", gather, 0)
    collectives._scatter_into = count("reduce-scatter", scatter, 1)
    batch = dist.batch_isend_irecv

    def counted_batch(operations: list[Any]) -> Any:
        for operation in operations:
            if operation.op is send:
                seen["send", operation.tensor.numel() * operation.tensor.element_size()] += 1
        return batch(operations)

    dist.batch_isend_irecv = counted_batch
    try:
        train_step(run, batches, lr=1e-3, weight_decay=0.0)
    finally:
        dist.all_reduce, dist.batch_isend_irecv = reduce, batch
        collectives._gather_into, collectives._scatter_into = gather, scatter
    return seen, sum(local.parameter.numel() for local in run.parameters)


def ranks_dp(changes: dict[str, Any], ranks: int) -> int:
    """Data-parallel size of a layout."""
    return ranks // int(changes.get(TP, 1)) // int(changes.get(PP, 1))
