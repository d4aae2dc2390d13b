"""How --rope-scaling-type changes the frequencies base^(-2j/r) of r rotated channels, as plain numbers.

ntk, dynamic and clex enlarge the base, the others divide each frequency by a number of its own.  Some go by
the length of the whole text.  What clex has learned comes on top, see layers/stretching.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from megatron_lite.config.sections.model import ModelConfig, listed_numbers


def scaled_base(model: ModelConfig, channels: int, length: int | None = None) -> float:
    """--rotary-base, or what ntk and dynamic make of it."""
    kind, factor = model.rope_scaling_type, model.rope_scaling_factor
    if kind == "ntk":
        return ntk_base(model.rotary_base, factor, channels)
    if kind == "dynamic":  # 1 up to the trained length; then it grows, to factor + 1 at twice that
        stretch = max(_known(length) / model.rope_original_length, 1.0)
        return ntk_base(model.rotary_base, factor * stretch - (factor - 1.0), channels)
    if kind == "clex":
        return clex_base(model, channels, stretch_of(model, _known(length)))
    return model.rotary_base


def clex_base(model: ModelConfig, channels: int, stretch: float) -> float:
    """The base that CLEX starts from, at a stretch from 1 on (arXiv:2310.16450)."""
    return ntk_base(model.rotary_base, 2.0 * stretch - 1.0, channels)


def stretch_of(model: ModelConfig, length: int) -> int:
    """How many times the trained length a text needs; 1 within it."""
    return -(-length // model.rope_original_length)


def ntk_base(base: float, factor: float, channels: int) -> float:
    """The base with which the slowest of the channels is slowed by the factor, the fastest not at all."""
    return float(base * factor ** (channels / (channels - 2)))


def frequency_divisors(
    model: ModelConfig, channels: int, length: int | None = None
) -> tuple[float, ...] | None:
    """What the frequency of each pair is divided by; None where all stay."""
    found = DIVISORS.get(model.rope_scaling_type)
    return None if found is None else tuple(found(model, channels, length))


def _known(length: int | None) -> int:
    assert length is not None, "the length of the whole text must be known"
    return length


def _linear(model: ModelConfig, channels: int, length: int | None) -> Iterator[float]:
    """Positions divided (arXiv:2306.15595)."""
    return (model.rope_scaling_factor for _ in range(channels // 2))


def _llama3(model: ModelConfig, channels: int, length: int | None) -> Iterator[float]:
    """Llama 3.1's: by the turns that a channel makes in the trained length."""
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    for pair in range(channels // 2):
        frequency = model.rotary_base ** -(2 * pair / channels)
        turns = model.rope_original_length * frequency / (2 * math.pi)
        yield _partly((turns - low) / (high - low), model)


def _yarn(model: ModelConfig, channels: int, length: int | None) -> Iterator[float]:
    """By the channel's number, evenly between those with beta_fast and beta_slow turns (arXiv:2309.00071)."""

    def pair_with(turns: float) -> float:
        wavelength = model.rope_original_length / (turns * 2 * math.pi)
        return channels * math.log(wavelength) / (2 * math.log(model.rotary_base))

    low, high = pair_with(model.rope_beta_fast), pair_with(model.rope_beta_slow)
    if model.rope_whole_channels:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    width = high - low if high != low else 1e-3
    return (_partly(1.0 - (pair - low) / width, model) for pair in range(channels // 2))


def _partly(kept: float, model: ModelConfig) -> float:
    """kept: the share of a frequency that stays, from 0 to 1; the rest is divided by the factor."""
    kept = min(max(kept, 0.0), 1.0)
    return 1.0 / (kept + (1.0 - kept) / model.rope_scaling_factor)


def _longrope(model: ModelConfig, channels: int, length: int | None) -> Iterator[float]:
    """What a search found for each pair, of two lists (arXiv:2402.13753)."""
    beyond = _known(length) > model.rope_original_length
    found = listed_numbers(model.rope_long_factors if beyond else model.rope_short_factors)
    return iter(found or ())


DIVISORS: Mapping[str, Callable[[ModelConfig, int, int | None], Iterator[float]]] = (
    MappingProxyType({"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope})
)
"""Types that divide frequencies."""
