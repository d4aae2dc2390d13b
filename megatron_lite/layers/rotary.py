"""Rotary positions (arXiv:2104.09864), the two-halves form that GPT-NeoX and Llama use."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(channels: int, base: float, index: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [s, 1 or b, 1, r/2], for positions index [s] or [s, b]; r rotated channels."""
    exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=index.device) / channels
    angle = index[..., None].double() * base**-exponent
    if index.dim() == 1:
        angle = angle[:, None]
    return angle.cos().float()[:, :, None], angle.sin().float()[:, :, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [s, b, n, d] -> the same with its first r channels rotated pairwise (i, i + r/2), in fp32.

    cos, sin: fp32 [s, 1 or b, 1, r/2] of rotary_tables.
    """
    half = cos.shape[-1]
    first, second, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    return turned.to(x.dtype)
