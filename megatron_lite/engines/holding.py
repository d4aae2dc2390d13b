"""What of a parameter a rank updates, and where its master lies."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_lite.blueprint.optimizers import gathered
from megatron_lite.engines.buckets import GradientBuckets
from megatron_lite.engines.held import Held
from megatron_lite.engines.offload import HostUpdate
from megatron_lite.optim.groups import Groups
from megatron_lite.optim.shares import TpShare
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import LocalParameter, ParameterPiece


def hold(
    local: LocalParameter,
    buckets: GradientBuckets,
    ctx: ParallelContext,
    groups: Groups,
    host: HostUpdate,
) -> Iterator[Held]:
    """The rows of this parameter that this rank updates: all, or its share; none of a frozen piece."""
    for piece in local.pieces:  # all ranks know all rules, whoever updates by them
        groups.prepare(piece.spec, ctx.device)
    for piece, rows in buckets.owned(local):
        how = groups.treatment(piece.spec)
        if how.frozen:
            continue
        here = slice(piece.start + rows.start, piece.start + rows.stop)
        weight = local.parameter.detach()[here]
        share = TpShare(piece.shape, piece.spec.tp_dim if ctx.tp.size > 1 else None)
        on_host = host.takes(piece)
        master = weight
        if is_gathered(piece, ctx, groups):
            pass  # its owner has master and states
        elif on_host:
            master = host.master(weight.shape)
        elif weight.dtype != torch.float32:
            master = weight.float()
        yield Held(
            local, piece, rows, here, weight, buckets.view(local), master, share, how.turns,
            own_sum=buckets.own_sum(local, piece), on_host=on_host,
        )  # fmt: skip


def is_gathered(piece: ParameterPiece, ctx: ParallelContext, groups: Groups) -> bool:
    """Whether one tp rank updates it for all of them."""
    return ctx.tp.size > 1 and gathered(groups.treatment(piece.spec), piece.spec)
