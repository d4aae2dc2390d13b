"""Documents packed into a micro batch: their borders, for kernels that take them and those that want a mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Which tokens of [rows, length] see one another: those of one segment, none of which crosses rows.

    cu_seqlens: int32 [n + 1] on the device, cumulative lengths 0, ..., rows * length of the segments,
    row after row: what kernels for sequences of many lengths call cu_seqlens of q and k.  longest: the
    most tokens of one (their max_seqlen), known without the device.
    """

    cu_seqlens: Tensor
    longest: int
    rows: int
    length: int

    @cached_property
    def allowed(self) -> Tensor:
        """bool [rows, 1, length, length]: where query i may see key j, causal; for kernels without segments.

        Made on first use and kept with this record.
        """
        place = torch.arange(
            self.rows * self.length, dtype=torch.int32, device=self.cu_seqlens.device
        )
        number = torch.searchsorted(self.cu_seqlens, place, right=True, out_int32=True)
        number = number.view(self.rows, 1, self.length)
        return (number[..., :, None] == number[..., None, :]).tril_()

    def unmasked(self) -> Segments:
        """The same without the mask that was kept."""
        return replace(self)
