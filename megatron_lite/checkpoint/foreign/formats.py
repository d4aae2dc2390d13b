"""FORMATS: how checkpoints of other programs are known and opened."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

from megatron_lite.checkpoint.foreign.deepspeed import is_deepspeed, open_deepspeed
from megatron_lite.checkpoint.foreign.model import ForeignModel
from megatron_lite.checkpoint.foreign.nanogpt import is_nanogpt, open_nanogpt
from megatron_lite.checkpoint.foreign.torch_dist import is_torch_dist, open_torch_dist


class Known(Protocol):
    """Whether a path is of this format; opens nothing."""

    def __call__(self, path: Path) -> bool:
        """By the names of its files."""
        ...


class Open(Protocol):
    """Looks through a checkpoint but for its numbers; vocab_size: keep so many rows of the tables."""

    def __call__(self, path: Path, *, vocab_size: int | None = None) -> ForeignModel:
        """Raises CheckpointError."""
        ...


class ForeignFormat(NamedTuple):
    """A row of FORMATS."""

    known: Known
    open: Open


FORMATS: dict[str, ForeignFormat] = {
    "nanoGPT": ForeignFormat(is_nanogpt, open_nanogpt),
    "Megatron-DeepSpeed": ForeignFormat(is_deepspeed, open_deepspeed),
    "torch_dist": ForeignFormat(is_torch_dist, open_torch_dist),
}
"""Whose -> how; a path belongs to the first that knows it."""


def format_of(path: Path) -> ForeignFormat | None:
    """The row that knows a path; None where it is no other program's."""
    return next((row for row in FORMATS.values() if row.known(path)), None)
