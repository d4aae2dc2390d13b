"""Labels drawn from logits: their distribution, the same at every tp, none that is padding."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_lite.kernels.random import exponential, feature_bits, key
from megatron_lite.kernels.table import TABLE
from megatron_lite.layers.cross_entropy import Scoring
from megatron_lite.layers.drawing import LabelNoise, draw_labels
from megatron_lite.parallel.context import Axis
from tests.support.spawn import spawn

VOCAB, PADDED, TOKENS = 13, 18, 40_000


def noise(step=0, tokens=TOKENS):
    return LabelNoise(torch.tensor(key(7, step)), torch.arange(tokens)[:, None])


def logits_of(tokens=TOKENS, dtype=torch.float32):
    """The same of every token, the padding the largest of all."""
    row = torch.linspace(-3.0, 2.0, VOCAB)[torch.randperm(VOCAB, generator=_generator())]
    padding = torch.full((PADDED - VOCAB,), 50.0)
    return torch.cat([row, padding]).to(dtype).expand(tokens, 1, PADDED).contiguous()


def _generator():
    return torch.Generator().manual_seed(5)


def scoring(rank=0, ranks=1):
    ops = [TABLE[op][-1].run for op in ("cross_entropy", "cross_entropy_gradients")]
    axis = Axis("tp", rank, ranks, tuple(range(ranks)), dist.group.WORLD if ranks > 1 else None)
    return Scoring(axis, VOCAB, *ops)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_have_the_distribution_of_the_softmax(dtype) -> None:
    logits = logits_of(dtype=dtype)
    before = logits.clone()
    drawn = draw_labels(logits, noise(), scoring())
    assert torch.equal(logits, before) and drawn.shape == (TOKENS, 1)
    counts = torch.bincount(drawn.flatten(), minlength=PADDED).double()
    assert not counts[VOCAB:].any()
    expected = TOKENS * logits[0, 0, :VOCAB].double().softmax(-1)
    chi_squared = ((counts[:VOCAB] - expected).square() / expected).sum().item()
    assert chi_squared < 32.9  # of 12 degrees of freedom 99.9 %; the numbers are fixed


def test_neighbouring_tokens_and_steps_draw_independently() -> None:
    logits = torch.zeros(TOKENS, 1, VOCAB)
    one, other = (draw_labels(logits, noise(step), scoring()).flatten() for step in (0, 1))
    # of so many pairs a 13th agree, give or take four standard deviations
    for first, second in ((one, other), (one[1:], one[:-1]), (one[64:], one[:-64])):
        share = (first == second).double().mean().item()
        assert share == pytest.approx(1 / VOCAB, abs=4 * (1 / VOCAB / TOKENS) ** 0.5)


def drawn_on(rank, ranks):
    columns = PADDED // ranks
    part = logits_of(500)[..., rank * columns : (rank + 1) * columns].contiguous()
    return draw_labels(part, noise(tokens=500), scoring(rank, ranks)).flatten().tolist()


@pytest.mark.parametrize("ranks", [2, pytest.param(6, marks=pytest.mark.ci)])
def test_every_tp_rank_draws_what_one_process_does(ranks) -> None:
    """On six ranks the last one has padding alone."""
    assert spawn(drawn_on, ranks) == [drawn_on(0, 1)] * ranks


def test_the_noise_is_exponential_and_fine_where_it_is_small() -> None:
    made = exponential(
        torch.tensor(key(3)), torch.arange(1000), feature_bits(torch.arange(2000))
    ).double()
    assert made.mean().item() == pytest.approx(1.0, abs=4e-3)
    for quantile in (1e-5, 1e-4, 1e-2, 0.5, 0.99):
        below = (made < -torch.log1p(torch.tensor(-quantile)).item()).double().mean().item()
        assert below == pytest.approx(quantile, rel=5 / (quantile * 2e6) ** 0.5)
    small = made[made < 1e-3]
    assert small.min() > 0.0 and small.unique().numel() > 0.99 * small.numel()
