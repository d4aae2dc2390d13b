"""The angles of rotary positions (arXiv:2104.09864), near and far; kernels turn by them.

--rope-scaling-type names a row of FREQUENCIES: what becomes of the frequencies base^(-2j/r) of r
rotated channels.  Some go by the length of the whole text, which must not change while it grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_lite.config.sections.model import BY_LENGTH, ModelConfig, numbers

Length = int | tuple[int, ...] | None
"""Tokens of a whole text, of each sample's where they differ; None where nothing goes by it."""


def rotary_tables(
    channels: int, model: ModelConfig, index: Tensor, length: Length = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [s, 1 or b, 1, r/2], for positions index [s] or [s, b]; r rotated channels."""
    if index.dim() == 1:
        index = index[:, None]
    angle = index[..., None].double() * _of_each(channels, model, length, index.device)
    cos, sin = angle.cos(), angle.sin()
    if (scale := model.rotary_scale) != 1.0:
        cos, sin = cos * scale, sin * scale
    return cos.float()[:, :, None], sin.float()[:, :, None]


def _of_each(channels: int, model: ModelConfig, length: Length, device: torch.device) -> Tensor:
    """Frequencies of all samples [r/2], or of each [b, r/2]."""
    if model.rope_scaling_type not in BY_LENGTH or not isinstance(length, tuple):
        return rotary_frequencies(channels, model, device, length=length)
    each = [rotary_frequencies(channels, model, device, length=one) for one in length]
    return torch.stack(each)


def rotary_frequencies(
    channels: int, model: ModelConfig, device: torch.device | None = None, *, length: Length = None
) -> Tensor:
    """Angle of one position, fp64 [r/2], as --rope-scaling-type asks for it."""
    pairs = torch.arange(0, channels, 2, dtype=torch.float64, device=device)
    base = model.rotary_base
    if model.rope_scaling_type == "ntk":
        base = ntk_base(base, model.rope_scaling_factor, channels)
    elif model.rope_scaling_type == "dynamic":
        base = ntk_base(base, _stretch(model, length), channels)
    plain = base ** -(pairs / channels)
    scaled = FREQUENCIES.get(model.rope_scaling_type)
    return plain if scaled is None else scaled(plain, model, length)


def ntk_base(base: float, factor: float, channels: int) -> float:
    """The base with which the slowest of the channels is slowed by the factor, the fastest not at all."""
    return float(base * factor ** (channels / (channels - 2)))


def _stretch(model: ModelConfig, length: Length) -> float:
    """dynamic: 1 up to the trained length; then it grows, so that the factor itself comes at twice that."""
    assert isinstance(length, int), f"the length of a text must be known, not {length}"
    factor = model.rope_scaling_factor
    return factor * max(length / model.rope_original_length, 1.0) - (factor - 1.0)


def _linear(plain: Tensor, model: ModelConfig, length: Length) -> Tensor:
    """Positions divided (arXiv:2306.15595)."""
    return plain / model.rope_scaling_factor


def _llama3(plain: Tensor, model: ModelConfig, length: Length) -> Tensor:
    """Llama 3.1's: by the turns that a channel makes in the trained length."""
    turns = model.rope_original_length * plain / (2 * math.pi)
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    return _partly(plain, ((turns - low) / (high - low)).clamp(0.0, 1.0), model)


def _yarn(plain: Tensor, model: ModelConfig, length: Length) -> Tensor:
    """By the channel's number, evenly between those with beta_fast and beta_slow turns (arXiv:2309.00071)."""
    channels = 2 * len(plain)

    def pair_with(turns: float) -> float:
        wavelength = model.rope_original_length / (turns * 2 * math.pi)
        return channels * math.log(wavelength) / (2 * math.log(model.rotary_base))

    low, high = pair_with(model.rope_beta_fast), pair_with(model.rope_beta_slow)
    if model.rope_whole_channels:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    width = high - low if high != low else 1e-3
    pair = torch.arange(len(plain), dtype=plain.dtype, device=plain.device)
    return _partly(plain, 1.0 - ((pair - low) / width).clamp(0.0, 1.0), model)


def _longrope(plain: Tensor, model: ModelConfig, length: Length) -> Tensor:
    """Each channel by a factor that a search found, of two lists (arXiv:2402.13753)."""
    assert isinstance(length, int), f"the length of a text must be known, not {length}"
    beyond = length > model.rope_original_length
    factors = numbers(model.rope_long_factors if beyond else model.rope_short_factors)
    return plain / torch.tensor(factors, dtype=plain.dtype, device=plain.device)


def _partly(plain: Tensor, kept: Tensor, model: ModelConfig) -> Tensor:
    """kept: the share of each frequency that stays, the rest is divided by the factor."""
    return plain * (kept + (1.0 - kept) / model.rope_scaling_factor)


FREQUENCIES: Mapping[str, Callable[[Tensor, ModelConfig, Length], Tensor]] = MappingProxyType(
    {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
)
"""Types that divide frequencies; ntk and dynamic change the base they are made of."""
