"""The angles of rotary positions (arXiv:2104.09864), near and far; kernels turn by them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_lite.config.sections.model import ModelConfig


def rotary_tables(channels: int, model: ModelConfig, index: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [s, 1 or b, 1, r/2], for positions index [s] or [s, b]; r rotated channels."""
    angle = index[..., None].double() * rotary_frequencies(channels, model, index.device)
    if index.dim() == 1:
        angle = angle[:, None]
    return angle.cos().float()[:, :, None], angle.sin().float()[:, :, None]


def rotary_frequencies(
    channels: int, model: ModelConfig, device: torch.device | None = None
) -> Tensor:
    """Angle of one position, fp64 [r/2], as --rope-scaling-type asks for it."""
    exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
    plain = model.rotary_base**-exponent
    if model.rope_scaling_type == "linear":  # arXiv:2306.15595
        return plain / model.rope_scaling_factor
    if model.rope_scaling_type == "llama3":
        return _slow_ones_slower(plain, model)
    return plain


def _slow_ones_slower(plain: Tensor, model: ModelConfig) -> Tensor:
    """Llama 3.1's: by the turns that a channel makes in the trained length."""
    turns = model.rope_original_length * plain / (2 * math.pi)
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return plain * (kept + (1.0 - kept) / model.rope_scaling_factor)
