"""Noise on embeddings by its paper: uniform, as large as a sample's own length says, in training alone."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from megatron_lite.data.batch import collate
from megatron_lite.data.samples import Sample
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.noise import step_noise, with_noise
from megatron_lite.parallel.context import Axis, ParallelContext
from megatron_lite.train.assemble import assemble
from megatron_lite.train.feed import to_device
from megatron_lite.train.step import evaluation_step, train_step
from tests.support.sizes import SEQ, VOCAB
from tests.support.tiny import draw, make_batches, tiny_config

ALPHA, H = 5.0, 256


def setting(tp: int = 1, rank: int = 0, *, sequence_parallel: bool = False) -> StageContext:
    config = tiny_config(model__hidden_size=H, model__num_attention_heads=4)
    ctx = ParallelContext(torch.device("cpu"), tp=Axis("tp", rank, tp, tuple(range(tp))))
    return StageContext(
        config.model, ctx, padded_vocab_size=64, vocab_size=VOCAB, seed=3, neftune_alpha=ALPHA,
        sequence_parallel=sequence_parallel,
    )  # fmt: skip


def where(context: StageContext, step: int = 0) -> ForwardContext:
    """Two rows: of samples of 4, 9 and 3 tokens, and of one of 16."""
    tokens = np.zeros(SEQ + 1, np.int64)
    rows = [Sample(tokens, None, np.array(ends, np.int32)) for ends in ([0, 4, 13, 16], [0, 16])]
    batch = collate(rows, np.array([7, 8]))
    noise = step_noise(context, step)
    return to_device(batch, torch.device("cpu"), training=True, noise=noise).positions


def test_it_is_uniform_and_as_large_as_each_samples_length_says() -> None:
    context = setting()
    x = torch.zeros(SEQ, 2, H)
    found = with_noise(x, where(context), context)
    for row, start, stop in ((0, 0, 4), (0, 4, 13), (0, 13, 16), (1, 0, 16)):
        largest = ALPHA / math.sqrt((stop - start) * H)
        part = found[start:stop, row] / largest
        assert 0.98 < part.abs().max() <= 1.0
        assert abs(part.mean()) < 4 / math.sqrt(3 * part.numel())
        assert part.var() == pytest.approx(1 / 3, rel=0.1)
    assert not torch.equal(found, with_noise(x, where(context, step=1), context))
    assert torch.equal(found, with_noise(x, where(context), context))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_sequence_parallelism_adds_its_part(rank: int) -> None:
    whole = with_noise(torch.zeros(SEQ, 2, H), where(setting()), setting())
    context = setting(2, rank, sequence_parallel=True)
    part = with_noise(torch.zeros(SEQ // 2, 2, H), where(context), context)
    assert torch.equal(part, whole[rank * SEQ // 2 : (rank + 1) * SEQ // 2])


def test_there_is_none_in_evaluation_and_without_the_flag() -> None:
    config = tiny_config(train__objective="sft", optim__optimizer="sgd")
    noisy = dataclasses.replace(config, train=dataclasses.replace(config.train, neftune_alpha=15.0))
    losses = {}
    for name, asked in (("plain", config), ("noisy", noisy)):
        blueprint = draw(asked, 1)
        run = assemble(asked, blueprint, ParallelContext.serial("cpu"))
        batches = make_batches(asked, blueprint, 0, 0)
        evaluated = evaluation_step(run, batches).tolist()
        losses[name] = (evaluated, train_step(run, batches, lr=0.0, weight_decay=0.0).loss.item())
    assert losses["plain"][0] == losses["noisy"][0]
    assert losses["plain"][1] != losses["noisy"][1]
    total, count = losses["plain"][0]
    assert losses["plain"][1] == pytest.approx(total / count, rel=1e-6)
