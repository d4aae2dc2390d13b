"""Ranks with other samples are one thing, ranks with the same weights another: two ranks of cp tell.

A toy feed stands for context parallelism: both ranks of cp compute a sample whole, and each lets
only its half of the tokens count in the loss.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.blueprint.grid import RankGrid
from megatron_lite.checkpoint.snapshot import share
from megatron_lite.config.errors import DistributedError
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rehearsal.process_group import simulated_rank
from megatron_lite.train import step as step_module
from megatron_lite.train.assemble import assemble
from megatron_lite.train.feed import to_device
from megatron_lite.train.health.replicas import check_replicas
from megatron_lite.train.health.state_hash import state_hash
from tests.support.axes import ZERO
from tests.support.engines import exact_weights
from tests.support.spawn import spawn
from tests.support.tiny import context, make_batches, tiny_config

CPU = torch.device("cpu")


def test_replicas_are_the_ranks_of_dp_and_cp_together() -> None:
    grid = RankGrid(tp=2, cp=2, dp=2)
    with simulated_rank(6, 8):  # tp 0, cp 1, dp 1
        ctx = ParallelContext.from_grid(grid, 6, CPU)
        assert (ctx.dp.ranks, ctx.dp.rank) == ((2, 6), 1)
        assert (ctx.replicas.ranks, ctx.replicas.rank) == ((0, 2, 4, 6), 3)


def test_without_cp_both_are_one_group() -> None:
    with simulated_rank(1, 4):
        ctx = ParallelContext.from_grid(RankGrid(tp=2, dp=2), 1, CPU)
        assert ctx.replicas is ctx.dp and ctx.dp.ranks == (1, 3)


def trained(rank, ranks, layout, cp):
    """Losses, norms, exact weights and what a save would write of two steps; then a flipped bit."""
    config = tiny_config(parallel__context_parallel_size=cp, **layout)
    blueprint = draw_up(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))

    def cut(batch, device, **how):
        micro = to_device(batch, device, **how)
        width = micro.loss_mask.shape[0] // cp
        mine = torch.zeros_like(micro.loss_mask)
        mine[run.ctx.cp.rank * width : (run.ctx.cp.rank + 1) * width] = 1
        return dataclasses.replace(micro, loss_mask=micro.loss_mask * mine)

    step_module.to_device = cut
    seen = []
    for step in range(2):
        run.progress.step = step
        batches = make_batches(config, blueprint, run.ctx.dp.rank, step, ragged=True)
        result = step_module.train_step(run, batches, lr=1e-2, weight_decay=0.1)
        seen += [result.loss.item(), result.update.grad_norm.item()]
    step_module.to_device = to_device
    check_replicas(run)
    hashes = {state_hash(run)}
    if not layout and ranks > 1:  # a rank that holds everything can tell alone
        hashes.add(state_hash(dataclasses.replace(run, ctx=ParallelContext.serial())))
    held = [*run.engine.weights(owned=True), *run.engine.state(owned=True)]
    written = [(s.name, s.offset, tuple(s.data.shape)) for s in share(held, run.ctx)]
    weights = {name: tensor.numpy().copy() for name, tensor in exact_weights(run.engine).items()}
    if rank == ranks - 1:
        next(iter(run.engine.weights(owned=False))).data.view(-1)[0] += 1
    try:
        check_replicas(run)
        drifted = ""
    except DistributedError as error:
        drifted = str(error)
    return seen, weights, written, hashes, drifted


def elements(written) -> int:
    return sum(torch.Size(shape).numel() for _, _, shape in written)


OVERLAP = {ZERO: 1, "parallel__overlap_param_gather": True}


@pytest.mark.ci
@pytest.mark.parametrize("layout", [{}, OVERLAP], ids=["whole state", "sharded state"])
def test_each_caller_uses_the_right_ranks_where_they_differ(layout) -> None:
    ((serial, weights, alone_written, _, _),) = spawn(trained, 1, layout, 1)
    ranks = spawn(trained, 4, layout, 2)
    for seen, mine, _, hashes, drifted in ranks:
        assert seen == pytest.approx(serial, rel=1e-5)
        for name, tensor in mine.items():
            np.testing.assert_allclose(tensor, weights[name], rtol=1e-4, atol=1e-5)
        assert len(hashes) == 1 and hashes == ranks[0][3]
        assert "rank 3 of cp-dp differ from ranks 0, 1, 2" in drifted
    boxes = [box for _, _, written, _, _ in ranks for box in written]
    assert len(set(boxes)) == len(boxes) and elements(boxes) == elements(alone_written)
