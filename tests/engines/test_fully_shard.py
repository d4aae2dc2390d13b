"""FSDP2 (torch.distributed.fsdp.fully_shard) as the oracle of sharded data parallelism: equal losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import torch_parallel
from benchmarks.bench_parallel import plain_model
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import UNTIED, ZERO
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

STEPS, LR = 6, 5e-3
STAGES = {stage: {ZERO: stage, "parallel__overlap_param_gather": True} for stage in (1, 2, 3)}
MODEL = {
    UNTIED: True, "model__make_vocab_size_divisible_by": 1, "parallel__ddp_bucket_size": 3000,
    "optim__adam_eps": 1e-6,
}  # fmt: skip
"""eps: a key bias moves no softmax, so its gradient is rounding, of which Adam makes a full step."""


def losses(rank: int, ranks: int, micro: int, reshard: bool) -> dict[Any, list[float]]:
    """Ours at each stage, and FSDP2's, from equal weights on equal batches; micro: their size."""
    found: dict[Any, list[float]] = {}
    config = tiny_config(**MODEL, train__micro_batch_size=micro)
    blueprint = draw(config, ranks)
    model = plain_model(assemble(config, draw(config, 1), ParallelContext.serial()))
    batches = [
        [make_batches(config, blueprint, dp, step % 2) for dp in range(ranks)]
        for step in range(STEPS)
    ]
    mesh = init_device_mesh("cpu", (ranks,))
    theirs = torch_parallel.fully_sharded(
        model,
        rank,
        ranks,
        mesh,
        reshard=reshard,
        optim=config.optim,
        lr=LR,
        num_microbatches=blueprint.microbatches(),
    )
    found["FSDP2"] = []
    for of_step in batches:
        rows = [torch.cat([torch.from_numpy(b.tokens) for b in mine]) for mine in of_step]
        loss = theirs(torch.stack(rows, dim=1).flatten(0, 1))
        dist.all_reduce(loss)
        found["FSDP2"].append(loss.item())
    for stage, changes in STAGES.items():
        config = tiny_config(**MODEL, train__micro_batch_size=micro, **changes)
        run = assemble(config, blueprint, context(blueprint, rank))
        found[stage] = [
            train_step(run, of_step[rank], lr=LR, weight_decay=torch_parallel.DECAY).loss.item()
            for of_step in batches
        ]
    return found


@pytest.mark.ci
@pytest.mark.parametrize("reshard", [False, True], ids=["kept", "resharded"])
@pytest.mark.parametrize("micro", [4, 1], ids=["one micro batch", "four micro batches"])
def test_every_stage_has_the_losses_of_fully_shard(micro, reshard) -> None:
    for found in spawn(losses, 2, micro, reshard):
        theirs = found.pop("FSDP2")
        assert theirs[-1] < theirs[0] - 0.1, "nothing is learned: equal losses would say little"
        for stage, ours in found.items():
            assert ours == pytest.approx(theirs, rel=1e-6), stage
