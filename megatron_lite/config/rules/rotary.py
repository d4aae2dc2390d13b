"""Rules about rotary positions and what stretches them.

Each function yields the problems of one rule; table.py lists them and runs them all.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.sections.model import ROTARY, SCALING, ModelConfig, listed_numbers
from megatron_lite.config.sections.run import RunConfig

_DEFAULTS = ModelConfig()


def rotary_channels(config: RunConfig, world_size: int) -> Iterator[str]:
    """Rotary positions turn pairs of channels."""
    m = config.model
    rotated = int(m.head_size * m.rotary_percent)
    if m.position_embedding_type == "rope" and (rotated < 2 or rotated % 2):
        yield (
            f"--position-embedding-type rope turns pairs, but --rotary-percent {m.rotary_percent} "
            f"of {m.head_size} channels per head is {rotated}; it must be even and at least 2"
        )


def rope_scaling(config: RunConfig, world_size: int) -> Iterator[str]:
    """What is said of rotary positions has a say."""
    m = config.model
    for name in ROTARY if m.position_embedding_type != "rope" else ():
        if (value := getattr(m, name)) != getattr(_DEFAULTS, name):
            said = "" if value is True else f" {value}"
            yield (
                f"--{name.replace('_', '-')}{said} has no say with --position-embedding-type "
                f"{m.position_embedding_type}; add --position-embedding-type rope, or drop it"
            )
    if m.position_embedding_type != "rope":
        return
    kind = m.rope_scaling_type
    for name, kinds in SCALING.items():
        if kind not in kinds and (value := getattr(m, name)) != getattr(_DEFAULTS, name):
            yield (
                f"--{name.replace('_', '-')} {value} has no say with --rope-scaling-type {kind}, only "
                f"with {', '.join(kinds)}; choose --rope-scaling-type from them, or drop it"
            )
    if kind in ("ntk", "dynamic", "clex") and m.rotated_channels == 2:
        yield (
            f"--rope-scaling-type {kind} needs at least 4 rotated channels per head, this model has 2: "
            "take linear, or wider heads"
        )
    if kind in ("llama3", "yarn"):
        yield from _slow_below_fast(m)
    if kind == "longrope":
        yield from _a_factor_for_each_pair(m)
    if kind == "clex":
        yield from _whole_stretches(m)


def _whole_stretches(m: ModelConfig) -> Iterator[str]:
    """CLEX draws how many times the trained length a step's samples are spread over."""
    factor, original = m.rope_scaling_factor, m.rope_original_length
    if factor < 2 or factor != int(factor):
        yield (
            f"--rope-scaling-factor {factor:g}: with --rope-scaling-type clex it is the largest of the "
            "whole stretches that are learned, from 2 on"
        )
    elif m.seq_length > original * factor:
        yield (
            f"--seq-length {m.seq_length} is more than --rope-original-length {original} x "
            f"--rope-scaling-factor {factor:g} = {original * factor:g}, and clex spreads samples within "
            f"that: give a factor of {-(-m.seq_length // original)}, or shorter samples"
        )


def _slow_below_fast(m: ModelConfig) -> Iterator[str]:
    """Where channels begin to be slowed, and where they are wholly."""
    names = {
        "llama3": ("rope_low_freq_factor", "rope_high_freq_factor"),
        "yarn": ("rope_beta_slow", "rope_beta_fast"),
    }[m.rope_scaling_type]
    slow, fast = (getattr(m, name) for name in names)
    if slow >= fast:
        flags = [f"--{name.replace('_', '-')}" for name in names]
        yield (
            f"{flags[0]} {slow} must be below {flags[1]} {fast}: slow channels have fewer turns than "
            "fast ones"
        )
    if m.rope_scaling_type == "yarn" and m.rotary_base <= 1:
        yield f"--rope-scaling-type yarn needs --rotary-base above 1, not {m.rotary_base}"


def _a_factor_for_each_pair(m: ModelConfig) -> Iterator[str]:
    pairs = m.rotated_channels // 2
    for flag, text in {
        "--rope-short-factors": m.rope_short_factors,
        "--rope-long-factors": m.rope_long_factors,
    }.items():
        found = listed_numbers(text)
        if text is None:
            yield (
                f"--rope-scaling-type longrope needs {flag}: {pairs} numbers with commas between, one for "
                "each pair of rotated channels, as the search for this model found them"
            )
        elif found is None or min(found) <= 0:
            yield f"{flag} {text[:40]} is no list of numbers above 0 with commas between"
        elif len(found) != pairs:
            yield (
                f"{flag} has {len(found)} numbers, and {m.rotated_channels} of {m.head_size} channels per "
                f"head are rotated: give {pairs}, one for each pair"
            )
