"""Every op in plain PyTorch: the reference that faster implementations are tested against."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.dropout import DropoutCall, dropout


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [..., in], weight [out, in], perhaps stored in another number format -> [..., out]."""
    return F.linear(x, weight.to(x.dtype), bias)


def linear_input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """dy: [..., out], weight [out, in], perhaps stored in another number format -> [..., in]."""
    return dy @ weight.to(dy.dtype)


def linear_weight_gradient(dy: Tensor, x: Tensor, accumulator: Tensor | None = None) -> Tensor:
    """dy: [..., out], x: [..., in] -> dyᵀx [out, in], added to the accumulator where there is one."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if accumulator is None:
        return dy.t() @ x
    if accumulator.dtype == dy.dtype:
        return accumulator.addmm_(dy.t(), x)
    return accumulator.add_(dy.t() @ x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """x: [..., h] -> [..., h] with mean 0 and variance 1 over h, then scale and shift (arXiv:1607.06450)."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, epsilon)


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """x: [..., h] -> [..., h] divided by its root mean square, then scaled (arXiv:1910.07467)."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + epsilon)
    y = (y * weight.float()).to(x.dtype)
    return y if bias is None else y + bias


def gelu(x: Tensor) -> Tensor:
    """x: [...] -> [...]; the tanh form that GPT-2 and Megatron use (arXiv:1606.08415)."""
    return F.gelu(x, approximate="tanh")


def gelu_erf(x: Tensor) -> Tensor:
    """x: [...] -> [...]; x times the normal distribution's integral, without approximation."""
    return F.gelu(x)


def swiglu(x: Tensor) -> Tensor:
    """x: [..., 2f] of gate and up -> silu(gate) * up, [..., f] (arXiv:2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def add_dropout(x: Tensor, y: Tensor, bias: Tensor | None, call: DropoutCall | None) -> Tensor:
    """x, y: [s, b, h], bias [h] -> x + drop(y + bias): a block's part joins the stream."""
    y = y if bias is None else y + bias
    return x + dropout(y, call)


_Norm = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]


def add_dropout_then(norm: _Norm) -> Callable[..., tuple[Tensor, Tensor]]:
    """The op add_dropout with a norm after it: (stream, its norm), of one norm or another."""

    def run(
        x: Tensor, y: Tensor, bias: Tensor | None, call: DropoutCall | None,
        weight: Tensor, norm_bias: Tensor | None, epsilon: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x = add_dropout(x, y, bias, call)
        return x, norm(x, weight, norm_bias, epsilon)

    return run


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x: [s, b, n, d] -> the same with its first r channels rotated pairwise, in fp32 (arXiv:2104.09864).

    Pairs are (i, i + r/2) of the two halves, as GPT-NeoX and Llama have them; interleaved, neighbours
    (2i, 2i + 1), as the paper has.  cos, sin: fp32 [s, 1 or b, 1, r/2].
    """
    half = cos.shape[-1]
    if interleaved:
        turning, rest = x.float().split([2 * half, x.shape[-1] - 2 * half], dim=-1)
        first, second = turning.unflatten(-1, (half, 2)).unbind(-1)
        pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return torch.cat((pairs.flatten(-2), rest), dim=-1).to(x.dtype)
    first, second, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    return turned.to(x.dtype)


def split_rotate(
    fused: Tensor, heads: int, kv_heads: int, angles: tuple[Tensor, Tensor] | None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """fused: [s, b, (n + 2m)d] -> q [b, n, s, d] and k, v [b, m, s, d]; q and k rotated by the angles.

    angles: cos and sin of rotate; None where positions are not rotary.  interleaved: see there.
    """
    s, b, width = fused.shape
    d = width // (heads + 2 * kv_heads)
    q, k, v = fused.split([heads * d, kv_heads * d, kv_heads * d], dim=-1)
    q = q.view(s, b, heads, d)
    k, v = (y.view(s, b, kv_heads, d) for y in (k, v))
    if angles is not None:
        q, k = (rotate(x, *angles, interleaved) for x in (q, k))
    q, k, v = (y.permute(1, 2, 0, 3) for y in (q, k, v))
    return q, k, v


def rotate_heads(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """q: [b, n, s, d], k: [b, m, s, d] -> the same, turned as rotate does; for what split_rotate has split."""
    q, k = (
        rotate(x.permute(2, 0, 1, 3), cos, sin, interleaved).permute(1, 2, 0, 3) for x in (q, k)
    )
    return q, k


def attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """q: [b, n, s, d], k, v: [b, m, t, d] with m dividing n -> [b, n, s, d].

    Scores, softmax and dropout are spelled out; the mask is aligned bottom right, so query i of s
    sees keys up to t - s + i.  `call.keep` gives the dropout mask, exact in every layout.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scale = call.scale if call.scale is not None else 1.0 / math.sqrt(q.shape[-1])
    # the smaller factor goes in before the product: fp16 scores overflow otherwise
    scores = (q * (scale / call.layer_scale)) @ k.transpose(-1, -2)
    if call.softmax_in_fp32:
        scores = scores.float()
    if call.layer_scale != 1.0:
        scores = scores * call.layer_scale
    s, t = scores.shape[-2:]
    if call.segments is not None or call.window is not None or call.seen is not None:
        scores = torch.where(call.allowed(s, t, q.device), scores, float("-inf"))
    else:
        future = torch.ones(s, t, dtype=torch.bool, device=q.device).triu(t - s + 1)
        scores = scores.masked_fill(future, float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(q.dtype)
    if call.dropout > 0.0:
        if call.keep is None:
            raise AssertionError("attention dropout without a mask: pass call.keep")
        weights = weights * call.keep() * (1.0 / (1.0 - call.dropout))
    return weights @ v
