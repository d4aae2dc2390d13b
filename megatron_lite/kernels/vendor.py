"""Attention by torch's own fused kernels and by flash-attn; imported only when chosen."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.kernels.attention import AttentionCall


def _seed(call: AttentionCall, device: torch.device) -> None:
    """Put the device's generator where this call's mask begins (one state: exact under pp, not tp)."""
    if call.dropout > 0.0:
        if device.type == "cuda":
            torch.cuda.manual_seed(call.seed)
        else:
            torch.manual_seed(call.seed)


def sdpa(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """torch's scaled_dot_product_attention; shapes as reference.attention."""
    _seed(call, q.device)
    s, t = q.shape[-2], k.shape[-2]
    mask, causal = None, s == t
    if call.segments is not None:
        mask, causal = call.segments.allowed, False
    elif s != t and s > 1:
        # torch aligns is_causal top left; a cached prefix needs bottom right
        mask = torch.ones(s, t, dtype=torch.bool, device=q.device).tril(t - s)
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "meta" and not (grouped and mask is not None):
        return _fused_on_a_gpu(q, k, v, mask, call)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=call.dropout, is_causal=causal and s > 1,
        scale=call.scale, enable_gqa=grouped,
    )  # fmt: skip


def _fused_on_a_gpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: AttentionCall
) -> Tensor:
    """The kernel a GPU would choose, for its shapes: without memory torch spells attention out."""
    causal = mask is None and q.shape[-2] > 1
    if mask is None:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, call.dropout, causal, scale=call.scale
        )[0]
        return out
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
    shape = (*q.shape[:-1], k.shape[-2])
    result: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias.expand(shape), True, call.dropout, causal, scale=call.scale
    )[0]
    return result


def flash(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """flash-attn 2 (extra "flash-attn"); shapes as reference.attention."""
    _seed(call, q.device)
    run = importlib.import_module("flash_attn").flash_attn_func
    out = run(
        *(x.transpose(1, 2) for x in (q, k, v)),
        dropout_p=call.dropout, softmax_scale=call.scale, causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out.transpose(1, 2)
