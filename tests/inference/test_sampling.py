"""Every filter against its definition, and draws against the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from megatron_lite.config.errors import ConfigError
from megatron_lite.inference.sampling import (
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample,
)

OUT = -math.inf
NONE = torch.zeros(1, 0, dtype=torch.int64)


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def test_temperature_zero_is_argmax_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 4.0]])
    chosen = sample(
        logits, torch.zeros(2, 1, dtype=torch.int64), temperature=0.0, generator=generator
    )
    assert chosen.tolist() == [1, 0]
    assert torch.equal(generator.get_state(), before)


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
    seen = torch.tensor([[0]])
    assert sample(logits, seen, temperature=0.0).item() == 0
    assert sample(logits, seen, temperature=0.0, repetition_penalty=2.0).item() == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"top_k": 2}, [0.0, 4 / 7, 0.0, 3 / 7]),
        ({"top_p": 0.8}, [0.0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 3, "top_p": 0.5}, [0.0, 4 / 7, 0.0, 3 / 7]),
    ],
)
def test_draws_follow_the_filtered_distribution(settings, expected) -> None:
    count = 20_000
    logits = logits_of(0.1, 0.4, 0.2, 0.3).expand(count, 4)
    generator = torch.Generator().manual_seed(7)
    drawn = sample(logits, NONE.expand(count, 0), generator=generator, **settings)
    share = drawn.bincount(minlength=4) / count
    # four standard deviations of a share: 4 * sqrt(0.25 / 20000) = 0.014
    assert_close(share, torch.tensor(expected), atol=0.014, rtol=0.0)
    assert share[torch.tensor(expected) == 0].sum() == 0


def test_equal_generators_draw_equally() -> None:
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    tokens = torch.zeros(50, 1, dtype=torch.int64)
    drawn = [
        sample(logits, tokens, top_k=20, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.1}, "--top-p 1.1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0"),
        ({"top_p": 0.0, "top_k": -1}, "2 problems"),
    ],
)
def test_a_value_out_of_range_names_its_flag(settings, words) -> None:
    with pytest.raises(ConfigError) as caught:
        sample(torch.zeros(1, 3), NONE, **settings)
    assert words in str(caught.value)
