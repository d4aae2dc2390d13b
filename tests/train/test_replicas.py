"""--check-replicas: one wrong bit in any copy is found, named and ends every rank alike."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.config.errors import DistributedError
from megatron_lite.train.assemble import assemble
from megatron_lite.train.ending.faults import Fault
from megatron_lite.train.health.replicas import bits_hash, check_replicas
from megatron_lite.train.step import train_step
from tests.support.axes import BF16, PP, SP, TP, ZERO
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

GATHER = {
    ZERO: 1, "parallel__overlap_param_gather": True, "parallel__overlap_grad_reduce": True,
}  # fmt: skip


def after_flip(rank, ranks, changes, flipped_rank, target):
    """What check_replicas says after two steps, of which the check must find nothing, and a flip."""
    config = tiny_config(**changes)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    for step in range(2):
        run.progress.step = step
        batches = make_batches(config, blueprint, run.ctx.dp.rank, step, ragged=True)
        train_step(run, batches, lr=1e-2, weight_decay=0.1)
        check_replicas(run)
    if rank == flipped_rank:
        fault = Fault("step", None, "flip", target)
        fault.attach(run)
        fault.at("step")
    try:
        check_replicas(run)
    except DistributedError as error:
        return str(error)
    return None


CLEX = {
    "model__position_embedding_type": "rope", "model__rope_scaling_type": "clex",
    "model__rope_original_length": 8,
}  # fmt: skip
NO_MAJORITY = "ranks {} of {} differ, and no majority tells who is right"
CASES = {
    "a weight over dp": (2, {}, 1, "blocks.1.attention.k.weight", NO_MAJORITY.format("0, 1", "dp")),
    "one of three": (3, {"train__global_batch_size": 6}, 1, "blocks.1.attention.k.weight",
                     "rank 1 of dp differ from ranks 0, 2"),
    "a master": (3, {BF16: True, "train__global_batch_size": 6}, 2, "master.final_norm.bias",
                 "rank 2 of dp differ from ranks 0, 1"),
    "a moment": (2, {PP: 1}, 0, "exp_avg_sq.blocks.0.mlp.up.weight",
                 NO_MAJORITY.format("0, 1", "dp")),
    "a norm over tp": (2, {TP: 2, SP: True}, 1, "blocks.3.mlp_norm.weight",
                       NO_MAJORITY.format("0, 1", "tp")),
    "a moment of a row bias over tp": (2, {TP: 2}, 0, "exp_avg.blocks.0.mlp.down.bias",
                                       NO_MAJORITY.format("0, 1", "tp")),
    "the tied table": (2, {PP: 2}, 1, "embedding.tokens.weight",
                       NO_MAJORITY.format("0, 1", "tied")),
    "what all stages share": (2, {PP: 2} | CLEX, 1, "rotary.up", NO_MAJORITY.format("0, 1", "pp")),
    "a moment of the tied table, sharded": (
        4, {PP: 2} | GATHER, 3, "exp_avg.embedding.tokens.weight",
        NO_MAJORITY.format("1, 3", "tied"),
    ),
    "a sharded run's weight": (2, GATHER | {BF16: True}, 1, "blocks.0.mlp.up.weight",
                               NO_MAJORITY.format("0, 1", "dp")),
}  # fmt: skip


EVERY_TIME = ("one of three", "a norm over tp", "the tied table")
NAMES = [name if name in EVERY_TIME else pytest.param(name, marks=pytest.mark.ci) for name in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_one_wrong_bit_is_found_and_named_by_all(name) -> None:
    ranks, changes, flipped_rank, target, who = CASES[name]
    said = spawn(after_flip, ranks, changes, flipped_rank, target)
    assert len(set(said)) == 1, said
    assert f"the copies of {target} have drifted apart: {who}" in said[0], said[0]
    assert said[0].startswith("iteration 1: ") and "(of 1 such tensors)" in said[0]


def test_what_is_on_one_rank_only_is_nobodys_copy() -> None:
    """Rows cut over tp differ by nature: a wrong bit there is no drift."""
    assert spawn(after_flip, 2, {TP: 2}, 1, "blocks.1.attention.k.weight") == [None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_single_bit_and_every_swap_changes_the_hash(dtype) -> None:
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = bits_hash(tensor).item()
    seen = {before}
    words = tensor.view(-1).view(torch.int32 if dtype.itemsize == 4 else torch.int16)
    for place in range(words.numel()):
        for bit in range(8 * dtype.itemsize):
            mask = (1 << bit) - ((1 << 8 * dtype.itemsize) if bit == 8 * dtype.itemsize - 1 else 0)
            words[place] ^= mask
            seen.add(bits_hash(tensor).item())
            words[place] ^= mask
    assert len(seen) == 1 + words.numel() * 8 * dtype.itemsize
    flat = tensor.view(-1)
    flat[[2, 9]] = flat[[9, 2]].clone()
    assert bits_hash(tensor).item() not in seen


def test_the_hash_does_not_depend_on_chunks(monkeypatch) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    whole = bits_hash(tensor).item()
    monkeypatch.setattr("megatron_lite.train.health.replicas._CHUNK", 7)
    assert bits_hash(tensor).item() == whole
