"""FLOPs against the published formulas and values."""

from __future__ import annotations

import pytest

from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.blueprint.flops import core_forward, flops_per_step, flops_per_token
from megatron_lite.config.sections.model import ModelConfig
from tests.blueprint.configs import GPT3_175B

GPT2 = ModelConfig(num_layers=12, hidden_size=768, num_attention_heads=12, seq_length=1024)


def llama3(layers: int, hidden: int, heads: int, ffn: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, seq_length=8192,
        group_query_attention=True, num_query_groups=8, ffn_hidden_size=ffn, swiglu=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "vocab", "full", "causal"),
    [
        (GPT3_175B, 51200, "1.0764e+12", "1.0619e+12"),
        (GPT2, 50304, "8.547e+08", "7.980e+08"),
        (llama3(32, 4096, 32, 14336), 128256, "5.791e+10", "5.147e+10"),
        (llama3(80, 8192, 64, 28672), 128256, "4.814e+11", "4.492e+11"),
        (llama3(126, 16384, 128, 53248), 128256, "2.625e+12", "2.524e+12"),
    ],
)
def test_flops_per_token_equal_the_published_values(
    model: ModelConfig, vocab: int, full: str, causal: str
) -> None:
    digits = len(full.partition(".")[2].partition("e")[0])
    assert f"{flops_per_token(model, vocab):.{digits}e}" == full
    assert f"{flops_per_token(model, vocab, attention='causal'):.{digits}e}" == causal


def test_a_175b_step_costs_what_both_conventions_say() -> None:
    assert f"{flops_per_step(GPT3_175B, 51200, 1536):.4e}" == "3.3862e+18"
    assert f"{flops_per_step(GPT3_175B, 51200, 1536, attention='causal'):.4e}" == "3.3406e+18"


def test_full_attention_is_the_formula_of_megatron_deepspeed() -> None:
    size, s, layers, h, v = 1536, 2048, 96, 12288, 51200
    formula = 6 * size * s * (12 * layers * h * h + h * v + 2 * layers * s * h)
    assert flops_per_step(GPT3_175B, v, size) == formula


def test_causal_attention_is_the_formula_of_megatron_lm() -> None:
    size, s, layers, h, v = 1536, 2048, 96, 12288, 51200
    formula = 6 * size * s * (layers * (4 * h * h + 2 * h * 4 * h) + h * v + layers * s * h)
    assert flops_per_step(GPT3_175B, v, size, attention="causal") == formula


def test_full_recompute_is_narayanans_equation_3() -> None:
    s, layers, h, v = 2048, 96, 12288, 51200
    formula = 96 * layers * h * h * (1 + s / (6 * h) + v / (16 * layers * h))
    got = flops_per_token(GPT3_175B, v, recompute="full")
    assert got == pytest.approx(formula, rel=1e-12)
    assert f"{got:.4e}" == "1.4340e+12"


def test_selective_recompute_adds_one_forward_of_the_attention_core() -> None:
    s, layers, h, v = 2048, 96, 12288, 51200
    added = flops_per_token(GPT3_175B, v, recompute="selective") - flops_per_token(GPT3_175B, v)
    assert added == 4 * s * h * layers


def test_heads_wider_than_hidden_count_with_their_own_width() -> None:
    wide = ModelConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, kv_channels=16, seq_length=4
    )
    projections, core, mlp = 4 * 2 * 8 * 32, 4 * 4 * 32, 2 * 2 * 8 * 32
    assert flops_per_token(wide, 10) == 3 * (projections + core + mlp + 2 * 8 * 10)


@pytest.mark.parametrize("window", [1, 5, 16, 99])
def test_a_window_counts_the_pairs_that_lie_in_it(window: int) -> None:
    """As half the square is what causal attention has, the band is what the square less its corner has."""
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, seq_length=16,
                        window_size=f"{window - 1},0")  # fmt: skip
    (layer,), seen = figure_of(model, 64).layers, min(window, 16)
    assert core_forward(layer, 16) == 4 * seen * 8
    pairs = sum(min(place + 1, window) for place in range(16))
    # half a pair a token is the diagonal, which half a square has not
    assert core_forward(layer, 16, "causal") == pytest.approx(4 * 8 * pairs / 16, abs=3 * 8)
    assert core_forward(layer, 16, "causal") <= core_forward(layer, 16)
