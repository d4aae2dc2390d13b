"""The angles of rotary positions (arXiv:2104.09864); kernels turn by them."""

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
