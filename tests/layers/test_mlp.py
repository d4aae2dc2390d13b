"""GELU's form is Megatron's: tanh where it would be fused with the bias, erf where not."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.config.flags.parser import ParsedFlags, parse
from megatron_lite.config.rules.table import notices
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.mlp import MLP
from megatron_lite.parallel.context import ParallelContext
from tests.support.extras import needs

MODEL = (
    "--num-layers 1 --hidden-size 24 --num-attention-heads 2 --seq-length 8 --train-iters 1 "
    "--mock-data --lr 1e-3"
)
FORMS = [
    ("", "tanh"),
    ("--no-bias-gelu-fusion", "erf"),
    ("--disable-bias-linear", "erf"),
    ("--no-bias-gelu-fusion --openai-gelu", "tanh"),
    ("--disable-bias-linear --gelu tanh", "tanh"),
    ("--gelu erf", "erf"),
]


def read(flags: str) -> ParsedFlags:
    return parse(f"{MODEL} {flags}".split())


def mlp(parsed: ParsedFlags) -> MLP:
    context = StageContext(
        model=parsed.config.model, ctx=ParallelContext.serial(), padded_vocab_size=128,
        vocab_size=100, precision=parsed.config.precision,
    )  # fmt: skip
    layer = MLP(context, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def halves(layer: MLP, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """What goes into GELU, and what comes out of the layer for what comes out of GELU."""
    bias = layer.down.bias
    return layer.up(x), lambda y: F.linear(y, layer.down.weight, bias)


@pytest.mark.parametrize(("flags", "form"), FORMS)
def test_gelu_has_the_form_of_the_flags(flags: str, form: str) -> None:
    parsed = read(flags)
    assert parsed.config.model.gelu == form
    layer, x = mlp(parsed), torch.randn(8, 2, 24)
    inner, outer = halves(layer, x)
    expected = outer(F.gelu(inner, approximate="none" if form == "erf" else "tanh"))
    torch.testing.assert_close(layer(x), expected)
    implied = any("GELU is its erf form" in notice for notice in parsed.notices)
    assert implied == (form == "erf" and "--gelu" not in flags)


@pytest.mark.slow  # its import compiles
@pytest.mark.parametrize("flags", ["", "--no-bias-gelu-fusion", "--disable-bias-linear"])
def test_gelu_equals_megatron_cores(flags: str) -> None:
    """Its arguments turn the fused kernel off where there is no bias or the flag says so."""
    core = needs("megatron.core")
    fused = importlib.import_module("megatron.core.fusions.fused_bias_gelu")
    layer, x = mlp(read(flags)), torch.randn(8, 2, 24)
    inner, outer = halves(layer, x)
    asked = core.transformer.TransformerConfig(
        num_layers=1, hidden_size=24, num_attention_heads=2,
        add_bias_linear="bias-linear" not in flags, bias_activation_fusion=not flags,
    )  # fmt: skip
    if asked.bias_activation_fusion:
        middle = fused.bias_gelu_impl(inner, torch.zeros(inner.shape[-1]))
    else:
        middle = asked.activation_func(inner)
    torch.testing.assert_close(layer(x), outer(middle), rtol=1e-5, atol=1e-4)


def test_no_line_says_that_nothing_changes_where_something_does() -> None:
    for flags, said in (
        ("--no-bias-gelu-fusion", None),
        ("--no-bias-gelu-fusion --gelu tanh", "--gelu tanh says its form"),
        ("--no-bias-gelu-fusion --swiglu", "--swiglu has no GELU"),
    ):
        found = [line for line in notices(read(flags).config, 1) if "bias-gelu" in line]
        assert found == (
            [] if said is None else [f"--no-bias-gelu-fusion: changes nothing; {said}"]
        )
