"""The angles of rotary positions (arXiv:2104.09864), near and far; kernels turn by them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from megatron_lite.blueprint.rotary import frequency_divisors, scaled_base
from megatron_lite.config.sections.model import BY_LENGTH, ModelConfig

TextLength = int | tuple[int, ...] | None
"""Tokens of a whole text, of each sample's where they differ; None where nothing goes by it."""

Turning = Callable[[int, ModelConfig, Tensor, TextLength, Tensor | None], tuple[Tensor, Tensor]]
"""(channels, model, index, length, factors) -> what rotary_tables makes of them."""


def rotary_tables(
    channels: int,
    model: ModelConfig,
    index: Tensor,
    length: TextLength = None,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [s, 1 or b, 1, r/2], for positions index [s] or [s, b]; r rotated channels.

    factors: [r/2] or [b, r/2], of frequencies: what was learned of them.
    """
    if index.dim() == 1:
        index = index[:, None]
    each = _of_each(channels, model, length, index.device)
    angle = index[..., None].double() * (each if factors is None else each * factors)
    cos, sin = angle.cos(), angle.sin()
    if (scale := model.rotary_scale) != 1.0:
        cos, sin = cos * scale, sin * scale
    return cos.float()[:, :, None], sin.float()[:, :, None]


def _of_each(channels: int, model: ModelConfig, length: TextLength, device: torch.device) -> Tensor:
    """Frequencies of all samples [r/2], or of each [b, r/2]."""
    if not isinstance(length, tuple):
        return rotary_frequencies(channels, model, device, length=length)
    if model.rope_scaling_type not in BY_LENGTH:
        return rotary_frequencies(channels, model, device)
    each = [rotary_frequencies(channels, model, device, length=one) for one in length]
    return torch.stack(each)


def rotary_frequencies(
    channels: int,
    model: ModelConfig,
    device: torch.device | None = None,
    *,
    length: int | None = None,
) -> Tensor:
    """Angle of one position, fp64 [r/2], as --rope-scaling-type asks for it."""
    pairs = torch.arange(0, channels, 2, dtype=torch.float64, device=device)
    plain = scaled_base(model, channels, length) ** -(pairs / channels)
    by = _divisors(model, channels, length, pinned=plain.device.type == "cuda")
    return plain if by is None else plain / by.to(plain.device, non_blocking=True)


@lru_cache(maxsize=64)  # a step asks for the same once per micro batch
def _divisors(
    model: ModelConfig, channels: int, length: int | None, *, pinned: bool
) -> Tensor | None:
    """fp64 [r/2] on the host.  pinned: a copy from other memory would wait for a GPU."""
    found = frequency_divisors(model, channels, length)
    if found is None:
        return None
    divisors = torch.tensor(found, dtype=torch.float64)
    return divisors.pin_memory() if pinned else divisors
