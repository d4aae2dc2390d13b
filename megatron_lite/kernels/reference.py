"""Every op in plain PyTorch: the reference that faster implementations are tested against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.kernels.attention import AttentionCall


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


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (arXiv:2002.05202)."""
    return F.silu(gate) * up


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
    if call.segments is not None:
        scores = torch.where(call.segments.allowed, scores, float("-inf"))
    else:
        future = torch.ones(s, t, dtype=torch.bool, device=q.device).triu(t - s + 1)
        scores = scores.masked_fill(future, float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(q.dtype)
    if call.dropout > 0.0:
        if call.keep is None:
            raise AssertionError("attention dropout without a mask: pass call.keep")
        weights = weights * call.keep() * (1.0 / (1.0 - call.dropout))
    return weights @ v
