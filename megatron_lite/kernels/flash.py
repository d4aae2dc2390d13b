"""Attention by the packages flash-attn and flash-attn-4; imported only when chosen."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.documents import is_cached, packed, unpacked, varlen
from megatron_lite.kernels.vendor import sdpa, seed_mask


def flash(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """flash-attn 2 (extra "flash-attn"), documents by its varlen; shapes as reference.attention.

    Its masks are aligned bottom right, as ours.
    """
    seed_mask(call, q.device)
    package: Any = importlib.import_module("flash_attn")
    options: dict[str, Any] = {
        "dropout_p": call.dropout, "softmax_scale": call.scale, "causal": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }  # fmt: skip
    if call.window is not None:
        options["window_size"] = (call.window - 1, 0)
    segments = call.segments
    if segments is None:
        rows = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = package.flash_attn_func(*rows, **options).transpose(1, 2)
        return out
    borders, longest = segments.cu_seqlens, segments.longest
    found = package.flash_attn_varlen_func(
        *map(packed, (q, k, v)), borders, borders, longest, longest, **options
    )
    return unpacked(found, segments.rows)


@functools.cache
def _activate_flash_4() -> None:
    """From now on torch's flash kernels are FlashAttention 4's, in this process."""
    importlib.import_module("torch.nn.attention").activate_flash_attention_impl("FA4")


def flash_4(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """FlashAttention 4 (package flash-attn-4) in the place of torch's; shapes as reference.attention."""
    _activate_flash_4()
    if call.segments is not None or call.window is not None:
        return varlen(q, k, v, call)
    if q.shape[-2] > 1 and is_cached(q, k):  # several tokens at once: a mask, which it has not
        return sdpa(q, k, v, call)
    attention: Any = importlib.import_module("torch.nn.attention")
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v, call)
