"""4-bit NormalFloat (arXiv:2305.14314 § 3): a matrix as codes of 16 quantiles and a scale per block of a row.

    codes    uint8 [out, in/2]      two to a byte, the first in the upper half
    absmax   fp32 [out, in/block]   the largest absolute value of so many neighbours of a row

These are the bits of the library bitsandbytes, flattened or not, so that either may read them.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

QUANTILES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""Of the standard normal distribution, scaled to [-1, 1], with a zero (appendix E)."""

_AT_ONCE = 1 << 22
"""Elements whose fp32 values are in memory together."""


def quantile_pairs(device: torch.device) -> Tensor:
    """fp32 [256, 2]: the two values of every byte."""
    values = torch.tensor(QUANTILES, device=device)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], 1)


@torch.no_grad()
def pack(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """[out, in] -> (codes, absmax): each value over its block's absmax becomes the nearest quantile.

    A block of zeros stays zeros; one with a value that is not finite has an absmax that is not.
    """
    rows, columns = weight.shape
    values = torch.tensor(QUANTILES, device=weight.device)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(rows, columns // block, device=weight.device)
    for some in _slabs(rows, columns):
        blocks = weight[some].float().reshape(-1, columns // block, block)
        absmax[some] = blocks.abs().amax(-1)
        # a block of zeros: 0 / 1, and not 0 / 0
        scale = absmax[some].masked_fill(absmax[some] == 0, 1.0)[..., None]
        shares = (blocks / scale).contiguous()  # of a matrix that lies the other way round, too
        found = torch.bucketize(shares, middles, out_int32=True).view(-1, columns // 2, 2)
        codes[some] = (found[..., 0] << 4) | found[..., 1]
    return codes, absmax


def unpack_at_once(codes: Tensor, absmax: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """(codes, absmax) -> [out, in]; pairs: quantile_pairs()."""
    values = pairs.index_select(0, codes.reshape(-1).int())
    return (values.view(absmax.numel(), -1) * absmax.view(-1, 1)).to(dtype).view(len(codes), -1)


def unpack(codes: Tensor, absmax: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, with fp32 values of some rows at a time."""
    rows, columns = codes.shape[0], codes.shape[1] * 2
    whole = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    for some in _slabs(rows, columns):
        values = pairs.index_select(0, codes[some].reshape(-1).int())
        scales = absmax[some].reshape(-1, 1)
        whole[some] = values.view(scales.shape[0], -1).mul_(scales).view(-1, columns)
    return whole


def _slabs(rows: int, columns: int) -> list[slice]:
    step = max(1, _AT_ONCE // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@cache
def bitsandbytes() -> Any:
    """The library's functions; ImportError where it is not installed."""
    return importlib.import_module("bitsandbytes.functional")


def unpack_by_bitsandbytes(
    codes: Tensor, absmax: Tensor, pairs: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same by one kernel of bitsandbytes."""
    library, shape = bitsandbytes(), torch.Size((codes.shape[0], codes.shape[1] * 2))
    state = library.QuantState(
        absmax=absmax.view(-1), shape=shape, code=pairs[:16, 1].contiguous(),
        blocksize=shape.numel() // absmax.numel(), quant_type="nf4", dtype=dtype,
    )  # fmt: skip
    whole: Tensor = library.dequantize_4bit(codes.view(-1, 1), state)
    return whole
