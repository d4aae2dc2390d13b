"""Buckets by the axis of their gradients: experts that only some ranks share lie between others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.engines.buckets import GradientBuckets
from megatron_lite.engines.gathering import Gathers
from megatron_lite.parallel.context import Axis, ParallelContext
from megatron_lite.parallel.shard import LocalParameter, ParameterPiece
from tests.support.spawn import spawn

SHAPES = [(5, 3), (4,), (7, 2), (6, 3), (3,), (8, 2)]
"""Every second one stands for an expert."""


def two_axes(rank, ranks):
    """replicas over all ranks, and in the place of cp the two that hold the same experts."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = rank // 2
    pair = Axis("pair", rank % 2, 2, (2 * mine, 2 * mine + 1), groups[mine])
    everybody = Axis("dp", rank, ranks, tuple(range(ranks)), dist.group.WORLD)
    return replace(
        ParallelContext.serial(), rank=rank, world_size=ranks, replicas=everybody, cp=pair
    )


def made():
    parameters = []
    for index, shape in enumerate(SHAPES):
        spec = Tensor(f"{index}.weight", shape, "weight")
        piece = ParameterPiece(spec, 0, shape[0], shape, (0,) * len(shape))
        over = "cp" if index % 2 else "replicas"
        parameters.append(LocalParameter(nn.Parameter(torch.zeros(shape)), (piece,), over=over))
    return parameters


def sums(rank, ranks, sharded):
    """Per parameter what its owned gradient rows are after the reduction, and its weights after a gather."""
    ctx, parameters = two_axes(rank, ranks), made()
    buckets = GradientBuckets.build(
        parameters, ctx, bucket_size=20, overlap=True, sharded=sharded,
        whole=lambda piece: 1.0 if piece.name == "3.weight" else None,
    )  # fmt: skip
    kinds = [{local.over for local in bucket.locals} for bucket in buckets.buckets]
    assert all(len(kind) == 1 for kind in kinds)
    assert max(len(bucket.locals) for bucket in buckets.buckets) > 1, "nothing lies between others"
    buckets.begin_last_backward()
    for local in reversed(parameters):
        buckets.view(local).fill_(float(rank + 1))
        buckets.ready(local.parameter)
    buckets.finish()
    reduced, weights = [], []
    for local in parameters:
        for _, rows in buckets.owned(local):
            reduced.append(set(buckets.view(local)[rows.start : rows.stop].flatten().tolist()))
            local.parameter.detach()[rows.start : rows.stop] = float(rank + 1)
    if sharded:
        gathers = Gathers()
        gathers.start(reversed(buckets.awake))
        gathers.wait_for_all()
    for local in parameters:
        weights.append(local.parameter.detach().unique().tolist())
    return reduced, weights


@pytest.mark.ci
@pytest.mark.parametrize("sharded", [False, True], ids=["all-reduced", "shared"])
def test_each_gradient_is_summed_over_its_own_axis(sharded) -> None:
    for rank, (reduced, weights) in enumerate(spawn(sums, 4, sharded)):
        pair = 3.0 if rank < 2 else 7.0
        for found in reduced if sharded else reduced[::2]:
            assert found in ({10.0}, {pair})
        if not sharded:
            assert reduced == [{10.0}, {pair}] * 3
            continue
        holders = [1.0, 2.0] if rank < 2 else [3.0, 4.0]
        for index, found in enumerate(weights):
            rows = SHAPES[index][0]
            if index == 3:
                assert len(found) == 1 and found[0] in holders
            elif index % 2:
                assert found == holders
            else:
                assert found == [1.0, 2.0, 3.0, 4.0][: -(-rows // -(-rows // 4))]
