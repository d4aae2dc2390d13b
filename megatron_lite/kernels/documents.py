"""Attention of packed documents by their borders, and windows: nothing is made for every pair of tokens.

FlexAttention skips tiles that nobody sees and is compiled; varlen takes the documents as sequences
of many lengths, and the window as a number.  Both are torch's own.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.compiled import compiled, in_words, warn_on_stderr
from megatron_lite.kernels.segments import Segments, window_mask
from megatron_lite.kernels.vendor import sdpa


def packed(x: Tensor) -> Tensor:
    """[b, n, s, d] -> [b s, n, d], row after row: a copy where there are several rows."""
    return x.transpose(1, 2).flatten(0, 1)


def unpacked(x: Tensor, rows: int) -> Tensor:
    """[b s, n, d] -> [b, n, s, d]."""
    return x.unflatten(0, (rows, -1)).transpose(1, 2)


class VarlenOptions(NamedTuple):
    """Which options torch's varlen_attn has: windows from 2.11, grouped heads from 2.12 on."""

    windows: bool
    scales: bool
    groups: bool


def varlen_attn() -> Any:
    """torch's function; ImportError where there is none."""
    return importlib.import_module("torch.nn.attention.varlen").varlen_attn


@functools.cache
def varlen_options(run: Callable[..., Tensor]) -> VarlenOptions:
    """Those of one version's function, looked up once and not in every layer."""
    known = inspect.signature(run).parameters
    return VarlenOptions("window_size" in known, "scale" in known, "enable_gqa" in known)


@functools.lru_cache(maxsize=8)
def _whole_rows(rows: int, length: int, device: torch.device) -> Segments:
    return Segments.whole(rows, length, device)


def is_cached(q: Tensor, k: Tensor) -> bool:
    """Whether keys of a cache stand before the queries: borders are those of whole rows."""
    return q.shape[-2] != k.shape[-2]


def varlen(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """torch's varlen_attn (FlashAttention 2); shapes as reference.attention, with segments or a window."""
    if q.device.type == "meta":  # as many bytes, and no kernel for shapes alone
        return sdpa(q, k, v, replace(call, segments=None, window=None))
    if is_cached(q, k):
        return sdpa(q, k, v, call)
    run = varlen_attn()
    known, options = varlen_options(run), dict[str, Any]()
    if known.windows:
        options["window_size"] = (-1 if call.window is None else call.window - 1, 0)
    else:  # torch 2.10
        assert call.window is None, "this varlen_attn has no window"
        options["is_causal"] = True
    if known.scales:
        options["scale"] = call.scale
    elif call.scale is not None:
        q = q * (call.scale * math.sqrt(q.shape[-1]))
    if known.groups:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:  # torch < 2.12
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    segments = call.segments or _whole_rows(q.shape[0], q.shape[2], q.device)
    borders, longest = segments.cu_seqlens, segments.longest
    out = run(*map(packed, (q, k, v)), borders, borders, longest, longest, **options)
    return unpacked(out, segments.rows)


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled for each shape once: documents come as tensors of shapes that stay."""
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
    run: Callable[..., Tensor] = compiled(flex.flex_attention)
    return run


def _block_mask(q: Tensor, call: AttentionCall) -> Any:
    """Of the call's segments and window, made once for all who ask."""
    if call.segments is not None:
        return call.segments.block_mask(call.window)
    assert call.window is not None, "FlexAttention is for documents and windows"
    return window_mask(q.shape[0], q.shape[2], call.window, q.device)


class Flex:
    """FlexAttention; shapes as reference.attention, with segments or a window.

    The compiler works when it is first called: where it fails, that is said once, and a dense mask
    takes its place.
    """

    def __init__(self) -> None:
        self.failed = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """See reference.attention."""
        if q.device.type == "meta":  # as many bytes, and nothing to compile
            return sdpa(q, k, v, replace(call, segments=None, window=None))
        if self.failed or is_cached(q, k):
            return sdpa(q, k, v, call)
        try:
            return compiled_flex()(
                q, k, v, block_mask=_block_mask(q, call), scale=call.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        except torch._dynamo.exc.TorchDynamoException as error:
            self.failed = True
            warn_on_stderr(
                f"FlexAttention could not be compiled ({in_words(error)[:200]}); documents and windows "
                "take a dense mask from here on, which is slower - --no-torch-compile takes varlen instead"
            )
            return sdpa(q, k, v, call)


flex = Flex()
