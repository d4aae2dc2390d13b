"""How often a run reads each of its corpora, from the sizes of the files; nothing is opened but headers."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.config.blend import blends
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.objectives import OBJECTIVES
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.config.sections.train import TrainConfig

_MAGIC = b"MMIDIDX\x00\x00"
_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
"""Type code of an .idx file -> bytes of a token (Megatron's format)."""


class Reading(NamedTuple):
    """A corpus, its tokens, the training split's share of them, and how often the run reads that."""

    prefix: str
    tokens: int
    share: float
    epochs: float


def corpus_tokens(prefix: str) -> int | None:
    """Tokens of prefix.bin by its size; None where there is no such pair of files."""
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        with index.open("rb") as file:
            header = file.read(18)
        size = tokens.stat().st_size
    except OSError:
        return None
    if len(header) < 18 or header[:9] != _MAGIC:
        return None
    _, code = struct.unpack("<QB", header[9:18])
    width = _WIDTHS.get(code)
    return size // width if width else None


def epochs(data: DataConfig, train: TrainConfig, blueprint: Blueprint) -> tuple[Reading, ...]:
    """One Reading per corpus that is there; empty for a run of unknown length or without files.

    Empty, too, where rows are not filled with tokens: how many an epoch has is not in the sizes.
    """
    if blueprint.train_samples is None or OBJECTIVES[train.objective].dataset != "pretrain":
        return ()
    try:
        found = blends(data)
    except ConfigError:
        return ()
    blend = found.by_split.get("train") or found.shared
    if blend is None:
        return ()
    needed = blueprint.train_samples * blueprint.model.seq_length
    share = found.split[0] if found.split else 1.0
    sizes = [corpus_tokens(prefix) for prefix in blend.prefixes]
    weights: list[float] = list(blend.weights or [float(size or 0) for size in sizes])
    whole = sum(weights)
    return tuple(
        Reading(prefix, size, share, needed * weight / whole / (size * share))
        for prefix, size, weight in zip(blend.prefixes, sizes, weights, strict=True)
        if size and share
    )
