"""Attention by torch's own fused kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from megatron_lite.kernels.attention import AttentionCall


def seed_mask(call: AttentionCall, device: torch.device) -> None:
    """Put the device's generator where this call's mask begins (one state: exact under pp, not tp)."""
    if call.dropout > 0.0:
        if device.type == "cuda":
            torch.cuda.manual_seed(call.seed)
        else:
            torch.manual_seed(call.seed)


def sdpa(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """torch's scaled_dot_product_attention; shapes as reference.attention."""
    seed_mask(call, q.device)
    asked = _asked(q, k, call)
    mask = asked["attn_mask"]
    if q.device.type == "cuda" and q.shape[2] == 1 and mask is not None and asked["enable_gqa"]:
        return one_query(q, k, v, asked)
    if q.device.type == "meta" and not (asked["enable_gqa"] and mask is not None):
        return _fused_on_a_gpu(q, k, v, mask, call)
    return F.scaled_dot_product_attention(q, k, v, **asked)


def one_query(q: Tensor, k: Tensor, v: Tensor, asked: dict[str, Any]) -> Tensor:
    """q: [b, n, 1, d], k, v: [b, m, t, d] -> [b, n, 1, d]: a group's heads are the queries of one head.

    With a mask torch's fused kernels take no grouped heads, and would otherwise get copies of k and v.
    """
    groups = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # [b, m, n/m, d]
    y = F.scaled_dot_product_attention(groups, k, v, **{**asked, "enable_gqa": False})
    return y.flatten(1, 2)[:, :, None]


def sdpa_kernel(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> str:
    """Which of its kernels torch's scaled_dot_product_attention takes for such tensors, by name."""
    number = torch._fused_sdp_choice(q, k, v, **_asked(q, k, call))
    return _KERNELS.get(SDPBackend(number), "math")


_KERNELS = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
}


def _asked(q: Tensor, k: Tensor, call: AttentionCall) -> dict[str, Any]:
    s, t = q.shape[-2], k.shape[-2]
    mask, causal = None, s == t
    narrow = call.window is not None and call.window < t
    if call.segments is not None or call.seen is not None or narrow:
        mask, causal = call.allowed(s, t, q.device), False
    elif s != t and s > 1:
        # torch aligns is_causal top left; a cached prefix needs bottom right
        mask = torch.ones(s, t, dtype=torch.bool, device=q.device).tril(t - s)
    return {
        "attn_mask": mask, "dropout_p": call.dropout, "is_causal": causal and s > 1,
        "scale": call.scale, "enable_gqa": q.shape[1] != k.shape[1],
    }  # fmt: skip


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
