"""Every filter against its definition, and draws against the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from megatron_lite.config.errors import ConfigError
from megatron_lite.inference.sampling import (
    Sampler,
    Sampling,
    drawn_at,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)
from megatron_lite.kernels.random import uniform

OUT = -math.inf


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def drawn(logits: torch.Tensor, count: int, **settings: float) -> torch.Tensor:
    """int64 [count] draws from logits [1, v]."""
    left = Sampling(**settings).filtered(logits, [])
    places = torch.tensor([uniform(7, n) for n in range(count)], dtype=torch.float64)
    return drawn_at(left.expand(count, -1), places)


def one(logits: torch.Tensor, tokens: list[int], **settings: float) -> int:
    return int(Sampler(Sampling(**settings), logits.shape[-1])(logits, tokens))


def test_temperature_zero_is_argmax() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 4.0]])
    tokens = [0]
    assert Sampler(Sampling(temperature=0.0), 3)(logits, tokens).tolist() == [1, 0]
    # also the limit: nothing overflows on the way
    for temperature in (1e-3, 1e-30, 5e-324):
        assert Sampler(Sampling(temperature=temperature), 3)(logits, tokens).tolist() == [1, 0]


def test_top_k_keeps_exactly_k_also_among_equals() -> None:
    assert keep_top_k(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2).tolist() == [[OUT, 4.0, 3.0, OUT]]
    assert keep_top_k(torch.zeros(1, 5), 3).isfinite().sum() == 3


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (0.01, [False, True, False, False]),
        (0.49, [False, True, False, False]),
        (0.51, [False, True, True, False]),
        (0.79, [False, True, True, False]),
        (0.81, [True, True, True, False]),
        (0.99, [True, True, True, True]),
    ],
)
def test_top_p_keeps_the_fewest_that_hold_p(p: float, kept: list[bool]) -> None:
    logits = logits_of(0.15, 0.5, 0.3, 0.05)
    left = keep_top_p(logits, p)
    assert left.isfinite().tolist() == [kept]
    assert torch.equal(left[left.isfinite()], logits[left.isfinite()])


def test_repetition_penalty_counts_a_token_once_and_knows_the_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 4.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    tokens = torch.tensor([[0, 1, 0, 0], [3, 3, 3, 3]])
    penalized = penalize_repetition(logits, tokens, 2.0)
    assert penalized.tolist() == [[1.0, -4.0, 4.0, 0.0], [1.0, 1.0, 1.0, 0.5]]
    assert logits[0, 0] == 2.0


def test_repetition_penalty_acts_on_the_likeliest_token_too() -> None:
    logits = torch.tensor([[3.0, 2.0]])
    seen = [0]
    assert one(logits, seen, temperature=0.0) == 0
    assert one(logits, seen, temperature=0.0, repetition_penalty=2.0) == 1


def test_min_p_keeps_what_is_near_the_likeliest() -> None:
    logits = logits_of(0.15, 0.5, 0.3, 0.05)
    assert keep_min_p(logits, 0.29).isfinite().tolist() == [[True, True, True, False]]
    assert keep_min_p(logits, 0.31).isfinite().tolist() == [[False, True, True, False]]
    assert keep_min_p(logits, 1.0).isfinite().tolist() == [[False, True, False, False]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"top_k": 2}, [0.0, 4 / 7, 0.0, 3 / 7]),
        ({"top_p": 0.8}, [0.0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 3, "top_p": 0.5}, [0.0, 4 / 7, 0.0, 3 / 7]),
        ({"min_p": 0.6}, [0.0, 4 / 7, 0.0, 3 / 7]),
    ],
)
def test_draws_follow_the_filtered_distribution(settings, expected) -> None:
    count = 20_000
    share = drawn(logits_of(0.1, 0.4, 0.2, 0.3), count, **settings).bincount(minlength=4) / count
    # four standard deviations of a share: 4 * sqrt(0.25 / 20000) = 0.014
    assert_close(share, torch.tensor(expected), atol=0.014, rtol=0.0)
    assert share[torch.tensor(expected) == 0].sum() == 0


def test_twenty_thousand_draws_fit_the_softmax() -> None:
    """Chi-squared of all tokens of a vocabulary: below its 99th percentile."""
    count, tokens = 20_000, 60
    logits = torch.randn(1, tokens, generator=torch.Generator().manual_seed(0))
    expected = logits.softmax(-1)[0].double() * count
    found = drawn(logits, count).bincount(minlength=tokens)
    chi_squared = float(((found - expected) ** 2 / expected).sum())
    free = tokens - 1
    # Wilson and Hilferty's approximation of the percentile; 2.326 is the normal one's
    assert chi_squared < free * (1 - 2 / (9 * free) + 2.326 * math.sqrt(2 / (9 * free))) ** 3


def test_no_token_beyond_the_k_likeliest_is_drawn() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    likeliest = set(logits[0].topk(5).indices.tolist())
    assert set(drawn(logits, 10_000, top_k=5, temperature=3.0).tolist()) == likeliest


def test_a_place_at_the_very_end_draws_a_token_that_may_be() -> None:
    logits = torch.tensor([[0.0, 1.0, OUT, OUT]])
    for place, token in ((0.0, 0), (math.nextafter(1.0, 0.0), 1)):
        assert drawn_at(logits, torch.tensor([place], dtype=torch.float64)).tolist() == [token]


def test_a_draw_is_a_function_of_seed_sample_and_place() -> None:
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    texts = [[0] * n for n in range(50)]

    def text(seed: int, sample: int) -> list[int]:
        sampler = Sampler(Sampling(), 100, seed, sample)
        return [int(sampler(logits, tokens)) for tokens in texts]

    assert text(3, 0) == text(3, 0)
    assert len({tuple(text(seed, sample)) for seed in (3, 4) for sample in (0, 1)}) == 4
    assert len(set(text(3, 0))) > 20


def test_ids_that_the_tokenizer_lacks_are_never_drawn() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 5:] = 50.0
    tokens = [0]
    for settings in (Sampling(temperature=0.0), Sampling(temperature=9.0)):
        assert int(Sampler(settings, 5)(logits, tokens)) < 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.1}, "--top-p 1.1"),
        ({"min_p": -0.1}, "--min-p -0.1"),
        ({"min_p": math.nan}, "--min-p nan"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0"),
        ({"top_p": 0.0, "top_k": -1}, "2 problems"),
    ],
)
def test_a_value_out_of_range_names_its_flag(settings, words) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(**settings)
    assert words in str(caught.value)
