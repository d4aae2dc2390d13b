"""Presets are the published models."""

from __future__ import annotations

import pytest

from megatron_lite.config.flags.parser import parse
from megatron_lite.config.flags.presets import PRESETS


def parameters(name: str, vocabulary: int) -> int:
    """Tied GPT: per block 12h^2 + 13h, the two embeddings, and the last norm."""
    m = parse(["--preset", name]).config.model
    block = 12 * m.hidden_size**2 + 13 * m.hidden_size
    tables = (vocabulary + m.num_positions) * m.hidden_size
    return m.num_layers * block + tables + 2 * m.hidden_size


@pytest.mark.parametrize(
    "name, vocabulary, count",
    [
        ("gpt2-124m", 50257, 124_439_808),
        ("gpt2-355m", 50257, 354_823_168),
        ("gpt2-774m", 50257, 774_030_080),
        ("gpt2-1.5b", 50257, 1_557_611_200),
        ("gpt3-175b", 51200, 174_615_846_912),
    ],
)
def test_parameters_equal_the_published_counts(name: str, vocabulary: int, count: int) -> None:
    assert parameters(name, vocabulary) == count


@pytest.mark.parametrize("name", PRESETS)
def test_the_name_says_the_size_and_heads_fit(name: str) -> None:
    amount, unit = float(name.split("-")[1][:-1]), name[-1]
    expected = amount * {"m": 1e6, "b": 1e9}[unit]
    assert abs(parameters(name, 50257) / expected - 1) < 0.05
    model = parse(["--preset", name]).config.model
    assert model.hidden_size % model.num_attention_heads == 0
    assert model.head_size in (64, 80, 96, 128)
