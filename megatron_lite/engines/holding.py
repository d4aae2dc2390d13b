"""What of a parameter a rank holds and updates, and where its master lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_lite.blueprint.buckets import bucket_elements
from megatron_lite.blueprint.figure.parts import LORA_A, LORA_B, MAGNITUDE
from megatron_lite.blueprint.optimizers import gathered
from megatron_lite.blueprint.turns import ALWAYS, NEVER, OfBlock, Turns
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.engines.bucket import Bucket
from megatron_lite.engines.buckets import GradientBuckets, Reductions
from megatron_lite.engines.held import Held
from megatron_lite.engines.offload import HostUpdate
from megatron_lite.optim.groups import Groups
from megatron_lite.optim.shares import TpShare
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import (
    DTYPES,
    LocalParameter,
    NamedSlice,
    ParameterPiece,
    is_primary_copy,
    weight_slices,
)


def buckets_by_stage(
    stages: Mapping[int, Sequence[LocalParameter]],
    ctx: ParallelContext,
    groups: Groups,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
) -> dict[int, GradientBuckets]:
    """What the replicas of each stage's parameters share, as --zero-stage says."""
    several = ctx.replicas.size > 1
    shares_gradients = several and parallel.shares_gradients
    in_fp32 = parallel.accumulate_allreduce_grads_in_fp32 or precision.name == "fp32"
    loads: dict[str, list[float]] = {}
    flying = Reductions()
    return {
        stage: GradientBuckets.build(
            held,
            ctx,
            bucket_size=bucket_elements(parallel, ctx.replicas.size),
            overlap=parallel.overlap_grad_reduce,
            sharded=several and parallel.shares_state,
            shares_gradients=shares_gradients,
            # a pipeline has many micro batches in flight: whole until the last backward of a step
            each_backward=shares_gradients and ctx.pp.size == 1,
            whole=partial(_cost_whole, groups=groups),
            loads=loads,
            flying=flying,
            turns=partial(_turns_of, groups=groups),
            layer_of=layer_of if several and parallel.shares_weights else lambda local: None,
            dtype=torch.float32 if in_fp32 else DTYPES[precision.name],
        )
        for stage, held in stages.items()
    }


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
        weight = buckets.bucket_of(local.parameter).own_weight(local, piece)
        weight = local.parameter.detach()[here] if weight is None else weight
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


def weights_held(
    parameters: Sequence[LocalParameter],
    apart: Mapping[Tensor, Bucket],
    ctx: ParallelContext,
    *,
    owned: bool,
) -> Iterator[NamedSlice]:
    """Weights as named slices: whole, or of those in a bucket of shared ones this rank's rows."""
    for local in parameters:
        bucket = apart.get(local.parameter)
        if bucket is None:
            yield from weight_slices([local], ctx, owned=owned)
        elif not owned or is_primary_copy(local, ctx):
            for piece, rows, own in bucket.own_weights(local):
                if rows.stop > rows.start:
                    yield piece.rows_from(rows.start, own)


def is_gathered(piece: ParameterPiece, ctx: ParallelContext, groups: Groups) -> bool:
    """Whether one tp rank updates it for all of them."""
    return ctx.tp.size > 1 and gathered(groups.treatment(piece.spec), piece.spec)


def learns(local: LocalParameter, groups: Groups) -> bool:
    """Whether any update changes it."""
    return not all(groups.treatment(piece.spec).frozen for piece in local.pieces)


def _turns_of(local: LocalParameter, groups: Groups) -> Turns:
    """Of all its pieces that are ever trained; ALWAYS, too, where they differ."""
    found = {groups.treatment(piece.spec).turns for piece in local.pieces} - {NEVER}
    (turns,) = found if len(found) == 1 else (ALWAYS,)
    return turns if isinstance(turns, OfBlock) else ALWAYS


def _cost_whole(piece: ParameterPiece, groups: Groups) -> float | None:
    """Of the update, where one replica carries it out for all of its rows."""
    how = groups.treatment(piece.spec)
    return how.cost(piece.shape) if how.needs(0) else None


_SMALL = (LORA_A, LORA_B, MAGNITUDE)


def layer_of(local: LocalParameter) -> str | None:
    """The layer whose weights one is shared with; None where it stays whole.

    So does what is read outside its layer's forward and backward: learned frequencies, and adapters,
    which a table reads in its backward.  Both are small.
    """
    layer, _, rest = local.spec.name.partition(".")
    if local.late or local.spec.name.rpartition(".")[2] in _SMALL:
        return None
    if layer == "blocks":
        return f"{layer}.{rest.partition('.')[0]}"
    # of a tied table two layers read, of the others of its layer one
    return local.spec.name if local.grads_per_backward > 1 or local.tied_across_stages else layer
