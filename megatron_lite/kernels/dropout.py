"""What a dropout of hidden values is asked for, and the dropout itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lite.kernels.random import keep_mask, token_numbers


class DropoutCall(NamedTuple):
    """One dropout: its rate, and what its mask is a function of.

    key: int64 scalar on the device, of seed, step, layer and site.
    samples: int64 [b]; positions: int64 [s] or [s, b], in the sample; features: int32 [h] of
    feature_bits.
    """

    rate: float
    key: Tensor
    samples: Tensor
    positions: Tensor
    features: Tensor

    def keep(self) -> Tensor:
        """bool [s, b, h], True where a value is kept."""
        return keep_mask(
            self.key, token_numbers(self.samples, self.positions), self.features, self.rate
        )


class _Drop(torch.autograd.Function):
    """x / (1 - rate) where kept; of the forward, only the mask stays in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (dy * keep).mul_(ctx.scale), None, None


def dropout(x: Tensor, call: DropoutCall | None) -> Tensor:
    """x: [s, b, h] -> the same with values dropped; without a call, x itself."""
    return x if call is None else _Drop.apply(x, call.keep(), 1.0 / (1.0 - call.rate))
