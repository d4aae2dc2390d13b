"""Dropout by its definition: x / (1 - rate) where kept, 0 where dropped, another mask at every place."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.kernels import reference
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.dropout import dropout
from megatron_lite.kernels.random import key
from megatron_lite.layers.attention import SelfAttention
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.dropout import (
    EMBEDDING_LAYER,
    SITES,
    HiddenDropout,
    key_index,
    step_dropout,
)
from megatron_lite.parallel.context import Axis, ParallelContext

S, B, H, HEADS = 16, 6, 48, 4


def setting_of(rate=0.25, seed=1, tp=1, rank=0, sequence_parallel=False):
    model = ModelConfig(
        hidden_size=H, num_attention_heads=HEADS, num_layers=2, seq_length=S,
        hidden_dropout=rate, attention_dropout=rate,
    )  # fmt: skip
    ctx = ParallelContext(torch.device("cpu"), tp=Axis("tp", rank, tp, tuple(range(tp))))
    return StageContext(
        model, ctx, padded_vocab_size=8, vocab_size=8, seed=seed,
        sequence_parallel=sequence_parallel,
    )  # fmt: skip


def at(context, step=0, samples=None):
    samples = torch.arange(B) if samples is None else samples
    drops = step_dropout(context, step)
    return ForwardContext(samples=samples, index=torch.arange(S), dropout=drops)


def hidden_dropout(x, context, layer=0, site="mlp.output", **where):
    return dropout(x, HiddenDropout(context, layer, site).call(at(context, **where)))


def drawn(*shape, seed=0):
    # no element is zero, so that a zero in the output was dropped
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_what_is_kept_is_divided_by_the_share_kept(rate):
    x = drawn(S, B, H).requires_grad_(True)
    y = hidden_dropout(x, setting_of(rate))
    kept = y != 0
    torch.testing.assert_close(y[kept], x.detach()[kept] / (1 - rate), rtol=1e-6, atol=0)
    n = y.numel()
    assert abs(kept.double().mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / n)
    dy = drawn(S, B, H, seed=1)
    y.backward(dy)
    torch.testing.assert_close(x.grad, torch.where(kept, dy / (1 - rate), 0.0), rtol=1e-6, atol=0)


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero():
    x = drawn(S, B, H)
    evaluated = ForwardContext(samples=torch.arange(B), index=torch.arange(S))
    assert dropout(x, HiddenDropout(setting_of(), 0, "mlp.output").call(evaluated)) is x
    assert hidden_dropout(x, setting_of(0.0)) is x
    assert step_dropout(setting_of(0.0), 0) is None


def test_every_step_layer_site_seed_and_sample_has_a_mask_of_its_own():
    x = torch.ones(S, B, H)
    rate = 0.5
    masks = {
        "first": hidden_dropout(x, setting_of(rate)),
        "again": hidden_dropout(x, setting_of(rate)),
        "step": hidden_dropout(x, setting_of(rate), step=1),
        "layer": hidden_dropout(x, setting_of(rate), layer=1),
        "site": hidden_dropout(x, setting_of(rate), site="attention.output"),
        "seed": hidden_dropout(x, setting_of(rate, seed=2)),
        "samples": hidden_dropout(x, setting_of(rate), samples=torch.arange(B) + B),
    }
    assert torch.equal(masks["first"], masks.pop("again"))
    for a, b in itertools.combinations(masks, 2):
        same = ((masks[a] != 0) == (masks[b] != 0)).double().mean()
        assert abs(same - 0.5) < 5 * 0.5 / math.sqrt(x.numel()), (a, b, same)


@pytest.mark.parametrize("tp", [2, 4])
def test_with_sequence_parallelism_a_rank_has_its_tokens_of_the_whole_mask(tp):
    x = drawn(S, B, H)
    whole = hidden_dropout(x, setting_of())
    for rank in range(tp):
        context = setting_of(tp=tp, rank=rank, sequence_parallel=True)
        part = hidden_dropout(x.chunk(tp)[rank], context)
        assert torch.equal(part, whole.chunk(tp)[rank])


def test_attention_with_dropout_is_the_spelled_out_formula():
    """softmax(q k / sqrt(d)) of the past, weights dropped and divided by the share kept, times v."""
    q, k, v = (drawn(2, HEADS, S, 8, seed=n).double() - 1.0 for n in range(3))
    keep = torch.rand(2, HEADS, S, S, generator=torch.Generator().manual_seed(3)) > 0.3
    ours = reference.attention(
        q, k, v, AttentionCall(dropout=0.3, keep=lambda: keep, softmax_in_fp32=False)
    )
    for b, n, i in itertools.product(range(2), range(HEADS), range(S)):
        scores = torch.stack([q[b, n, i] @ k[b, n, j] / math.sqrt(8) for j in range(i + 1)])
        weights = scores.exp() / scores.exp().sum() * keep[b, n, i, : i + 1] / 0.7
        expected = sum(w * v[b, n, j] for j, w in enumerate(weights))
        torch.testing.assert_close(ours[b, n, i], expected, rtol=1e-12, atol=1e-12)


def test_attention_masks_differ_by_head_query_key_sample_and_step():
    def mask(step=0, layer=0, tp=1, rank=0, first=0):
        context = setting_of(0.5, tp=tp, rank=rank)
        attention = SelfAttention(context, layer)
        where = at(context, step=step, samples=torch.arange(first, first + 2))
        keep = attention._call(where, S, S).keep
        assert keep is not None
        return keep()

    whole = mask()
    assert whole.shape == (2, HEADS, S, S)
    others = {"step": mask(step=1), "layer": mask(layer=1), "samples": mask(first=2)}
    others |= {"head": whole.roll(1, 1), "query": whole.roll(1, 2), "key": whole.roll(1, 3)}
    for name, other in others.items():
        same = (whole == other).double().mean()
        assert abs(same - 0.5) < 5 * 0.5 / math.sqrt(whole.numel()), (name, same)
    # the heads of a tp rank are its part of all heads
    assert torch.equal(torch.cat([mask(tp=2, rank=r) for r in (0, 1)], dim=1), whole)


def test_no_attention_dropout_in_evaluation():
    where = ForwardContext(samples=torch.arange(B), index=torch.arange(S))
    assert SelfAttention(setting_of(), 0)._call(where, S, S).dropout == 0.0


def test_a_steps_keys_are_those_of_seed_step_layer_and_site():
    """One tensor for all layers and sites: the numbers that each would make by itself."""
    drops = step_dropout(setting_of(seed=9), 41)
    assert drops.keys[key_index(EMBEDDING_LAYER, "embedding")] == key(9, 41, -1, "embedding")
    for layer, site in itertools.product(range(2), SITES):
        assert drops.keys[key_index(layer, site)] == key(9, 41, layer, site)
    assert len(drops.keys.unique()) == 1 + 2 * len(SITES)


def test_a_vendor_kernels_seed_is_of_numbers_that_the_host_knows():
    """Another in every step, layer, sample and tp rank; nothing is read from the device."""

    def seed(step=0, layer=0, first=0, tp=1, rank=0):
        context = setting_of(tp=tp, rank=rank)
        where = at(context, step=step, samples=torch.empty(B, dtype=torch.int64, device="meta"))
        where = dataclasses.replace(where, first_sample=first)
        return SelfAttention(context, layer)._call(where, S, S).seed

    seeds = {seed(), seed(step=1), seed(layer=1), seed(first=8), seed(tp=2, rank=1)}
    assert len(seeds) == 5 and seed() == seed()
