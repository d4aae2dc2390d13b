"""Attention of packed documents by their borders: nothing is made for every pair of tokens.

FlexAttention skips tiles between documents and is compiled; varlen takes the documents as sequences
of many lengths.  Both are torch's own.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.compiled import compiled, in_words, warn_on_stderr
from megatron_lite.kernels.vendor import sdpa


def packed(x: Tensor) -> Tensor:
    """[b, n, s, d] -> [b s, n, d], row after row: a copy where there are several rows."""
    return x.transpose(1, 2).flatten(0, 1)


def unpacked(x: Tensor, rows: int) -> Tensor:
    """[b s, n, d] -> [b, n, s, d]."""
    return x.unflatten(0, (rows, -1)).transpose(1, 2)


def varlen(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """torch's varlen_attn (FlashAttention 2); shapes as reference.attention, segments in any case."""
    segments = call.segments
    assert segments is not None, "varlen is for documents"
    if q.device.type == "meta":  # as many bytes, and no kernel for shapes alone
        return sdpa(q, k, v, replace(call, segments=None))
    run = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(run).parameters
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1, 0)
    else:  # torch 2.10
        options["is_causal"] = True
    if "scale" in known:
        options["scale"] = call.scale
    elif call.scale is not None:
        q = q * (call.scale * math.sqrt(q.shape[-1]))
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:  # torch < 2.12
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    borders, longest = segments.cu_seqlens, segments.longest
    out = run(*map(packed, (q, k, v)), borders, borders, longest, longest, **options)
    return unpacked(out, segments.rows)


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled for each shape once: documents come as tensors of shapes that stay."""
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
    run: Callable[..., Tensor] = compiled(flex.flex_attention)
    return run


class Flex:
    """FlexAttention; shapes as reference.attention, segments in any case.

    The compiler works when it is first called: where it fails, that is said once, and a dense mask
    takes its place.
    """

    def __init__(self) -> None:
        self.failed = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """See reference.attention."""
        assert call.segments is not None, "FlexAttention is for documents"
        if q.device.type == "meta":  # as many bytes, and nothing to compile
            return sdpa(q, k, v, replace(call, segments=None))
        if self.failed:
            return sdpa(q, k, v, call)
        try:
            return compiled_flex()(
                q, k, v, block_mask=call.segments.block_mask, scale=call.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        except torch._dynamo.exc.TorchDynamoException as error:
            self.failed = True
            warn_on_stderr(
                f"FlexAttention could not be compiled ({in_words(error)[:200]}); documents are kept apart "
                "by a dense mask from here on, which is slower - --no-torch-compile takes varlen instead"
            )
            return sdpa(q, k, v, call)


flex = Flex()
