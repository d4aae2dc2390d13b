"""LayerNorm and RMSNorm equal their closed formulas in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.norm import NormLayer
from megatron_lite.parallel.context import Axis, ParallelContext

H, EPSILON = 24, 1e-3  # an epsilon large enough to show if it is added at another place


def formula(kind, x, weight, bias, dy):
    """(y, dx, dweight, dbias), written out; everything float64 [rows, h].

    With z the normalised x, g = dy * weight and means over h:
    LayerNorm (arXiv:1607.06450)  dx = (g - mean(g) - z mean(g z)) / sqrt(var + epsilon)
    RMSNorm (arXiv:1910.07467)    dx = (g - z mean(g z)) / sqrt(mean(x^2) + epsilon)
    """
    mean = x.mean(-1, keepdim=True) if kind == "LayerNorm" else torch.zeros_like(x[..., :1])
    scale = (((x - mean) ** 2).mean(-1, keepdim=True) + EPSILON).sqrt()
    z, g = (x - mean) / scale, dy * weight
    dx = g - z * (g * z).mean(-1, keepdim=True)
    if kind == "LayerNorm":
        dx = dx - g.mean(-1, keepdim=True)
    return z * weight + bias, dx / scale, (dy * z).sum((0, 1)), dy.sum((0, 1))


def norm_of(kind, precision=None):
    model = ModelConfig(
        hidden_size=H, num_attention_heads=2, num_layers=1, seq_length=8,
        normalization=kind, norm_epsilon=EPSILON,
    )  # fmt: skip
    ctx = ParallelContext(torch.device("cpu"), tp=Axis("tp"))
    context = StageContext(
        model, ctx, padded_vocab_size=8, vocab_size=8,
        precision=precision or PrecisionConfig(),
    )  # fmt: skip
    return NormLayer(context, context.figure.final_norm)


def drawn():
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # rows of very different size and offset, so that mean, variance and epsilon all matter
    sizes = torch.tensor([1e-2, 0.3, 1.0, 5.0, 30.0], dtype=torch.float64)[:, None, None]
    x = draw(5, 3, H) * sizes + sizes / 2
    return x, 1.0 + 0.3 * draw(H), draw(H), draw(5, 3, H)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_a_norm_is_its_formula(kind) -> None:
    x, weight, bias, dy = drawn()
    module = norm_of(kind)
    x, weight, bias, dy = (t.float().double() for t in (x, weight, bias, dy))
    bias = bias if kind == "LayerNorm" else torch.zeros_like(bias)
    module.weight.data.copy_(weight)
    if module.bias is not None:
        module.bias.data.copy_(bias)
    ours = x.float().requires_grad_(True)
    y = module(ours)
    y.backward(dy.float())
    expected = formula(kind, x, weight, bias, dy)
    found = [y.detach(), ours.grad, module.weight.grad]
    found += [module.bias.grad] if module.bias is not None else []
    for name, a, b in zip(("y", "dx", "dweight", "dbias"), found, expected, strict=False):
        # fp32 has 6e-8; 24 terms that partly cancel cost a digit and a half
        error = (a.double() - b).abs().amax() / b.abs().amax()
        assert error < 2e-6, (name, error)
        # row by row as well: a small row is not hidden by a large one
        rows = (a.double() - b).norm(dim=-1) / b.norm(dim=-1)
        assert rows.max() < 5e-6, (name, rows)


def test_the_formulas_differ_where_they_should() -> None:
    """LayerNorm forgets an offset and a size; RMSNorm only a size."""
    x = torch.randn(4, 2, H, generator=torch.Generator().manual_seed(0))
    layer, rms = norm_of("LayerNorm"), norm_of("RMSNorm")
    for module in (layer, rms):
        module.weight.data.fill_(1.0)
    layer.bias.data.zero_()
    assert rms.bias is None
    torch.testing.assert_close(layer(x + 3.0), layer(x), rtol=1e-4, atol=1e-4)
    assert (rms(x + 3.0) - rms(x)).abs().max() > 0.5


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_bf16_statistics_are_computed_in_fp32(kind) -> None:
    """Only the result is rounded: mean and variance from bf16 sums would be off by percents."""
    model = norm_of(kind, PrecisionConfig(bf16=True))
    x, weight, bias, _ = (t.bfloat16() for t in drawn())
    model.weight.data.copy_(weight)
    bias = bias if kind == "LayerNorm" else torch.zeros_like(bias)
    if model.bias is not None:
        model.bias.data.copy_(bias)
    expected = formula(kind, x.double(), weight.double(), bias.double(), x.double())[0]
    y = model(x)
    assert y.dtype == torch.bfloat16
    # one rounding of the result: half a unit in the last of 8 bits
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=2**-9)
