"""Dropout by its definition: x / (1 - rate) where kept, 0 where dropped, another mask at every place."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.kernels import reference
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.layers.attention import SelfAttention
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.dropout import hidden_dropout
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


def at(step=0, samples=None, training=True):
    samples = torch.arange(B) if samples is None else samples
    return ForwardContext(samples=samples, index=torch.arange(S), step=step, training=training)


def drawn(*shape, seed=0):
    # no element is zero, so that a zero in the output was dropped
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_what_is_kept_is_divided_by_the_share_kept(rate):
    x = drawn(S, B, H).requires_grad_(True)
    y = hidden_dropout(x, at(), setting_of(rate), 0, "site")
    kept = y != 0
    torch.testing.assert_close(y[kept], x.detach()[kept] / (1 - rate), rtol=1e-6, atol=0)
    n = y.numel()
    assert abs(kept.double().mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / n)
    dy = drawn(S, B, H, seed=1)
    y.backward(dy)
    torch.testing.assert_close(x.grad, torch.where(kept, dy / (1 - rate), 0.0), rtol=1e-6, atol=0)


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero():
    x = drawn(S, B, H)
    assert hidden_dropout(x, at(training=False), setting_of(), 0, "site") is x
    assert hidden_dropout(x, at(), setting_of(0.0), 0, "site") is x


def test_every_step_layer_site_seed_and_sample_has_a_mask_of_its_own():
    x = torch.ones(S, B, H)
    rate = 0.5
    masks = {
        "first": hidden_dropout(x, at(), setting_of(rate), 0, "a"),
        "again": hidden_dropout(x, at(), setting_of(rate), 0, "a"),
        "step": hidden_dropout(x, at(step=1), setting_of(rate), 0, "a"),
        "layer": hidden_dropout(x, at(), setting_of(rate), 1, "a"),
        "site": hidden_dropout(x, at(), setting_of(rate), 0, "b"),
        "seed": hidden_dropout(x, at(), setting_of(rate, seed=2), 0, "a"),
        "samples": hidden_dropout(x, at(samples=torch.arange(B) + B), setting_of(rate), 0, "a"),
    }
    assert torch.equal(masks["first"], masks.pop("again"))
    for a, b in itertools.combinations(masks, 2):
        same = ((masks[a] != 0) == (masks[b] != 0)).double().mean()
        assert abs(same - 0.5) < 5 * 0.5 / math.sqrt(x.numel()), (a, b, same)


@pytest.mark.parametrize("tp", [2, 4])
def test_with_sequence_parallelism_a_rank_has_its_tokens_of_the_whole_mask(tp):
    x = drawn(S, B, H)
    whole = hidden_dropout(x, at(), setting_of(), 0, "site")
    for rank in range(tp):
        context = setting_of(tp=tp, rank=rank, sequence_parallel=True)
        part = hidden_dropout(x.chunk(tp)[rank], at(), context, 0, "site")
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
        where = at(step=step, samples=torch.arange(first, first + 2))
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
    call = SelfAttention(setting_of(), 0)._call(at(training=False), S, S)
    assert call.dropout == 0.0
