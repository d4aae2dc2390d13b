"""Documents packed into a micro batch: their borders, for kernels that take them and those that want a mask."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

TILE = 128
"""Queries and keys of a tile of FlexAttention's, which is done whole, in part or not at all."""


@dataclass(frozen=True)
class Segments:
    """Which tokens of [rows, length] see one another: those of one segment, none of which crosses rows.

    cu_seqlens: int32 [n + 1] on the device, cumulative lengths 0, ..., rows * length of the segments,
    row after row: what kernels for sequences of many lengths call cu_seqlens of q and k.  longest: no
    segment has more tokens (their max_seqlen), known without the device.
    """

    cu_seqlens: Tensor
    longest: int
    rows: int
    length: int
    _kept_by: Segments | None = field(default=None, repr=False, compare=False)
    _cut: dict[tuple[int, int], Segments] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def allowed(self) -> Tensor:
        """bool [rows, 1, length, length]: where query i may see key j, causal; for kernels without segments.

        Made on first use and kept with this record.
        """
        number = self._numbers().view(self.rows, 1, self.length)
        return (number[..., :, None] == number[..., None, :]).tril_()

    @classmethod
    def whole(cls, rows: int, length: int, device: torch.device) -> Segments:
        """Rows that are one segment each."""
        borders = torch.arange(rows + 1, dtype=torch.int32, device=device) * length
        return cls(borders, length, rows, length)

    @cached_property
    def starts(self) -> Tensor:
        """int32 [rows, length]: where in its row a token's segment begins."""
        rows = torch.arange(self.rows, dtype=torch.int32, device=self.cu_seqlens.device)
        begins = self.cu_seqlens[self._numbers() - 1]
        return begins.view(self.rows, self.length) - rows[:, None] * self.length

    @cached_property
    def lengths(self) -> Tensor:
        """int32 [rows, length]: how many tokens a token's segment has."""
        return self.cu_seqlens.diff()[self._numbers() - 1].view(self.rows, self.length)

    def block_mask(self, window: int | None = None) -> Any:
        """FlexAttention's BlockMask, made on first use: once for all layers, those run again too.

        window: tokens that one sees, itself included; see AttentionCall.
        """
        kept = (self._kept_by or self)._block_masks
        if window not in kept:
            kept[window] = block_mask(_no_further(self.starts, window))
        return kept[window]

    @cached_property
    def _block_masks(self) -> dict[int | None, Any]:
        return {}

    def within(self, size: int, shift: int) -> Segments:
        """Cut once more, at `shift` of each row and every `size` tokens from there; made on first use, kept."""
        if (size, shift) not in self._cut:
            if self._kept_by is not None:
                made = self._kept_by.within(size, shift).unmasked()
            else:
                made = replace(
                    self, cu_seqlens=self._cut_at(size, shift), longest=min(self.longest, size)
                )
            self._cut[size, shift] = made
        return self._cut[size, shift]

    def _cut_at(self, size: int, shift: int) -> Tensor:
        device = self.cu_seqlens.device
        inside = torch.arange(shift, self.length, size, dtype=torch.int32, device=device)
        rows = torch.arange(self.rows, dtype=torch.int32, device=device) * self.length
        borders = (rows[:, None] + inside).flatten()
        return torch.cat((self.cu_seqlens, borders)).sort().values

    def afresh(self) -> Segments:
        """The same, of which nothing has been made yet."""
        return replace(self, _kept_by=None)

    def unmasked(self) -> Segments:
        """The same without the dense mask that was kept; what is small stays shared."""
        return replace(self, _kept_by=self._kept_by or self)

    def _numbers(self) -> Tensor:
        """int32 [rows * length]: each token's segment, counted from 1."""
        place = torch.arange(
            self.rows * self.length, dtype=torch.int32, device=self.cu_seqlens.device
        )
        return torch.searchsorted(self.cu_seqlens, place, right=True, out_int32=True)


@lru_cache(maxsize=8)
def window_mask(rows: int, length: int, window: int, device: torch.device) -> Any:
    """FlexAttention's BlockMask of a causal window over whole rows, made once for all micro batches."""
    return Segments.whole(rows, length, device).block_mask(window)


def _no_further(starts: Tensor, window: int | None) -> Tensor:
    """starts [b, s] moved to where a token's window begins, if that is later in its row."""
    if window is None:
        return starts
    place = torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device)
    return torch.maximum(starts, place - (window - 1))


def block_mask(starts: Tensor) -> Any:
    """FlexAttention's BlockMask of causal segments: query i of a row sees keys from starts [b, s] on.

    Only a number for every pair of tiles is made, never one for every pair of tokens, and nothing is
    read from the device.  Its tensors' shapes do not depend on the segments: one compiled kernel
    serves all micro batches.
    """
    length, device = starts.shape[1], starts.device
    tile = torch.arange(-(-length // TILE), device=device)
    query, key = tile[:, None], tile
    # starts grow along a row, a window's, too: a tile's first token sees furthest back
    furthest = starts[:, ::TILE, None]
    nearest = starts[:, (tile * TILE + TILE - 1).clamp(max=length - 1), None]
    seen = (key <= query) & (key >= furthest // TILE)
    # a last tile of fewer queries is never whole, as torch has it
    whole = (key < query) & (key * TILE >= nearest) & (query * TILE + TILE <= length)

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= starts[b, i])

    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
    return flex.BlockMask.from_kv_blocks(
        *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=TILE, mask_mod=allowed,
        seq_lengths=(length, length),
    )  # fmt: skip


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """bool [b, queries, keys] -> int32 how many are true [b, 1, queries], and which, these first."""
    which = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], which.to(torch.int32)[:, None]
