"""Every reference equals its formula, written a second time in float64 or in whole numbers of Python."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.kernels import reference
from megatron_lite.kernels.cross_entropy import VocabularyPart
from megatron_lite.kernels.dropout import DropoutCall, dropout
from megatron_lite.kernels.nf4 import QUANTILES
from megatron_lite.kernels.products import added_weight_gradient
from megatron_lite.kernels.table import TABLE
from tests.support.extras import needs
from tests.support.kernels import IN_PLACE, B, S, arguments, dropout_call, weighted

M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def mixed(z: int) -> int:
    """SplitMix64's output function."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & M64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & M64
    return z ^ (z >> 31)


def murmur(x: int) -> int:
    """MurmurHash3's finaliser without its last shift."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & M32
    return (x ^ (x >> 13)) * 0xC2B2AE35 & M32


def kept(where: str, sample: int, position: int, feature: int, rate: float) -> bool:
    """Whether a value is kept: `where` is seed, step, layer and site."""
    digest = hashlib.blake2b(where.encode(), digest_size=8).digest()
    token = sample * 2**24 + position
    bits = mixed(token * 0x9E3779B97F4A7C15 + int.from_bytes(digest, "little") & M64) >> 32
    word = murmur(bits ^ murmur(feature * 0x9E3779B1 & 0x7FFFFFFF))
    signed = word - (1 << 32) if word >> 31 else word
    return signed >= int(rate * 2**32) - 2**31


def keep_of(call: DropoutCall, step: int = 3) -> Tensor:
    where = "\x1f".join(map(str, (1234, step, 5, "attention.output")))
    return torch.tensor([
        [
            [kept(where, int(n), int(i), f, call.rate) for f in range(len(call.features))]
            for n in call.samples
        ]
        for i in call.positions
    ])  # fmt: skip


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("step", [0, 7])
def test_a_hidden_mask_is_its_definition_bit_for_bit(rate: float, step: int) -> None:
    call = dropout_call(rate, step)
    assert torch.equal(call.keep(), keep_of(call, step))


def normed(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, center: bool) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if center else x
    y = x / ((x * x).mean(-1, keepdim=True) + epsilon).sqrt() * weight
    return y if bias is None else y + bias


def joined(x: Tensor, y: Tensor, bias: Tensor, call: DropoutCall) -> Tensor:
    return x + torch.where(keep_of(call), (y + bias) / (1 - call.rate), 0.0)


def turned(fused: Tensor, n: int, m: int, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Pairs (i, i + r/2) of a head as complex numbers, each times a number of size 1."""
    s, b, width = fused.shape
    heads = fused.view(s, b, n + 2 * m, -1).permute(1, 2, 0, 3)  # [b, n + 2m, s, d]
    turn = torch.complex(*(part.double() for part in angles)).permute(1, 2, 0, 3)
    half = turn.shape[-1]
    pairs = torch.complex(heads[..., :half], heads[..., half : 2 * half]) * turn
    rotated = torch.cat([pairs.real, pairs.imag, heads[..., 2 * half :]], dim=-1)
    return rotated[:, :n], rotated[:, n : n + m], heads[:, n + m :]


def turned_heads(q: Tensor, k: Tensor, *angles: Tensor) -> tuple[Tensor, ...]:
    fused = torch.cat((q, k, k), dim=1).permute(2, 0, 1, 3).flatten(2)
    return turned(fused, q.shape[1], k.shape[1], angles)[:2]


def attended(q: Tensor, k: Tensor, v: Tensor, call: Any) -> Tensor:
    """Query by query: weights exp(q k / sqrt(d)) over the past."""
    rows = []
    for i in range(q.shape[2]):
        past = [x[:, :, : i + 1].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)]
        scores = (q[:, :, i : i + 1] * past[0]).sum(-1) / math.sqrt(q.shape[-1])
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        rows.append((weights[..., None] * past[1]).sum(2))
    return torch.stack(rows, dim=2)


def added(dy: Tensor, x: Tensor, accumulator: Tensor) -> Tensor:
    return accumulator + torch.einsum("sbo,sbi->oi", dy, x)


def scored(x: Tensor, labels: Tensor, part: VocabularyPart, entropy: bool) -> tuple[Tensor, ...]:
    """log p of the label, log of the sum, what to take off for a log p, and the sum of p log p."""
    real = x[..., : part.vocab_size]
    log_sum = real.exp().sum(-1).log()
    log_p = real - log_sum[..., None]
    picked = log_p.gather(-1, labels[..., None])[..., 0]
    return picked, log_sum, (log_p.exp() * log_p).sum(-1)


def unpacked(codes: Tensor, absmax: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """Number by number: the quantile of a half byte times the scale of its block."""
    wide, block = codes.shape[1] * 2, codes.shape[1] * 2 // absmax.shape[1]
    return torch.tensor([
        [QUANTILES[(int(row[n // 2]) >> (0 if n % 2 else 4)) % 16] * float(scales[n // block])
         for n in range(wide)]
        for row, scales in zip(codes, absmax, strict=True)
    ], dtype=torch.float64)  # fmt: skip


def gradient_of_scores(
    x: Tensor, labels: Tensor, part: VocabularyPart, offset: Tensor, dy: Tensor, entropy: Any
) -> Tensor:
    p = (x - offset[..., None]).exp()
    value, dh = entropy
    grad = dy[..., None] * (p - torch.nn.functional.one_hot(labels, x.shape[-1]))
    return grad - dh[..., None] * p * (x - offset[..., None] + value[..., None])


FORMULAS: dict[str, Callable[..., Any]] = {
    "linear_forward": lambda x, w, b: torch.einsum("sbi,oi->sbo", x, w) + b,
    "linear_input_gradient": lambda dy, w: torch.einsum("sbo,oi->sbi", dy, w),
    "linear_weight_gradient": added,
    "split_rotate": turned,
    "rotate_heads": turned_heads,
    "dropout": lambda x, call: torch.where(keep_of(call), x / (1 - call.rate), 0.0),
    "add_dropout": joined,
    "add_dropout_layer_norm": lambda x, y, b, call, w, nb, e: (
        joined(x, y, b, call), normed(joined(x, y, b, call), w, nb, e, center=True),
    ),
    "add_dropout_rms_norm": lambda x, y, b, call, w, nb, e: (
        joined(x, y, b, call), normed(joined(x, y, b, call), w, nb, e, center=False),
    ),
    "unpack_nf4": unpacked,
    "cross_entropy": scored,
    "cross_entropy_gradients": gradient_of_scores,
    "layer_norm": lambda x, w, b, e: normed(x, w, b, e, center=True),
    "rms_norm": lambda x, w, b, e: normed(x, w, b, e, center=False),
    "gelu": lambda x: x / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "swiglu": lambda x: x[..., :7] / (1 + torch.exp(-x[..., :7])) * x[..., 7:],
    "attention": attended,
}  # fmt: skip


def in_double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return tuple(map(in_double, value)) if type(value) is tuple else value


@pytest.mark.parametrize("op", TABLE)
def test_every_reference_equals_its_formula(op: str) -> None:
    found = []
    for run, inputs in (
        (TABLE[op][-1].run, arguments(op)),
        (FORMULAS[op], [in_double(value) for value in arguments(op)]),
    ):
        tensors = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        with torch.set_grad_enabled(op not in IN_PLACE):
            results = run(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        results = tuple(result for result in results if result is not None)
        if op not in IN_PLACE:
            weighted(results).backward()
        found.append([*results, *(x.grad for x in tensors if x.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)


def test_interleaved_pairs_are_neighbours_as_complex_numbers() -> None:
    """Two channels of eight do not turn."""
    fused, n, m, angles = arguments("split_rotate")
    q, k, v = reference.split_rotate(fused, n, m, angles, True)
    heads = fused.view(S, B, n + 2 * m, 8).permute(1, 2, 0, 3)
    turn = torch.complex(*(part.double() for part in angles)).permute(1, 2, 0, 3)
    pairs = torch.view_as_complex(heads[..., :6].double().unflatten(-1, (3, 2)).contiguous())
    turned = torch.cat((torch.view_as_real(pairs * turn).flatten(-2), heads[..., 6:]), dim=-1)
    expected = turned[:, :n], turned[:, n : n + m], heads[:, n + m :]
    for ours, theirs in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)
    plain = reference.split_rotate(fused, n, m, None)[:2]
    for ours, theirs in zip(reference.rotate_heads(*plain, *angles, True), (q, k), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_as_in_megatron_core(interleaved: bool) -> None:
    core = needs("megatron.core.models.common.embeddings.rope_utils")
    x, angle = torch.randn(S, B, 4, 8), torch.rand(S, 1, 1, 3) * 6.0
    twice = torch.stack((angle, angle), -1).flatten(-2) if interleaved else angle.repeat(1, 1, 1, 2)
    theirs = core._apply_rotary_pos_emb_bshd(x, twice, rotary_interleaved=interleaved)
    ours = reference.rotate(x, angle.cos(), angle.sin(), interleaved)
    torch.testing.assert_close(ours, theirs)


def test_a_weight_gradient_goes_into_its_accumulator_in_fp32() -> None:
    """Sums of bf16 products: what an accumulator holds is not rounded to 8 bits again."""
    dy, x, _ = (value.detach() for value in arguments("linear_weight_gradient"))
    for dtype in (torch.float32, torch.bfloat16):
        total = torch.full((16, 24), 1000.0)
        returned = reference.linear_weight_gradient(dy.to(dtype), x.to(dtype), total)
        assert returned is total
        expected = 1000.0 + torch.einsum("sbo,sbi->oi", dy.double(), x.double())
        error = 1e-3 if dtype == torch.float32 else 0.1  # a bf16 of 1000 has steps of 4
        torch.testing.assert_close(total.double(), expected, rtol=0, atol=error)
        alone = reference.linear_weight_gradient(dy.to(dtype), x.to(dtype))
        assert alone.dtype == dtype
        torch.testing.assert_close(alone.double(), expected - 1000.0, rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_that_adds_by_itself_rounds_nothing(dtype: torch.dtype) -> None:
    """Sixteen micro batches: its fp32 sums are exact where the reference rounds each product first."""
    generator = torch.Generator().manual_seed(0)
    sums = {name: torch.full((16, 24), 3.0) for name in ("ours", "reference")}
    exact = torch.full((16, 24), 3.0, dtype=torch.float64)
    for _ in range(16):
        dy = torch.randn(S, B, 16, generator=generator).to(dtype)
        x = torch.randn(S, B, 24, generator=generator).to(dtype)
        exact += torch.einsum("sbo,sbi->oi", dy.double(), x.double())
        assert added_weight_gradient(dy, x, sums["ours"]) is sums["ours"]
        reference.linear_weight_gradient(dy, x, sums["reference"])
    torch.testing.assert_close(sums["ours"].double(), exact, rtol=1e-6, atol=1e-5)
    rounded = (sums["reference"] - exact).abs().max()
    assert 100 * (sums["ours"] - exact).abs().max() < rounded < 0.2
    alone = added_weight_gradient(dy, x)
    assert torch.equal(alone, reference.linear_weight_gradient(dy, x))
    low = torch.zeros(16, 24, dtype=dtype)  # --no-accumulate-allreduce-grads-in-fp32
    assert torch.equal(added_weight_gradient(dy, x, low), alone)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_stored_in_another_format_is_read_in_the_activations(stored: torch.dtype) -> None:
    x, weight, bias = (value.detach() for value in arguments("linear_forward"))
    kept_as = weight.to(stored)
    y = reference.linear_forward(x, kept_as, bias)
    assert torch.equal(y, reference.linear_forward(x, kept_as.float(), bias))
    dx = reference.linear_input_gradient(y, kept_as)
    assert dx.dtype == torch.float32
    assert torch.equal(dx, reference.linear_input_gradient(y, kept_as.float()))


def test_without_a_bias_or_a_dropout_or_angles_nothing_is_added() -> None:
    x, y, _, _ = arguments("add_dropout")
    assert torch.equal(reference.add_dropout(x, y, None, None), x + y)
    assert dropout(x, None) is x
    fused, n, m, _ = arguments("split_rotate")
    q, k, v = reference.split_rotate(fused, n, m, None)
    assert torch.equal(torch.cat([q, k, v], 1).permute(2, 0, 1, 3).reshape(fused.shape), fused)
