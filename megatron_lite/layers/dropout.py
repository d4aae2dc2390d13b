"""Hidden dropout as a pure function of seed, step, layer, site, sample, token and feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.parallel.collectives import local_slice
from megatron_lite.parallel.random import keep_mask, key, token_numbers


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (dy * keep).mul_(ctx.scale), None, None


def hidden_dropout(
    x: Tensor, at: ForwardContext, context: StageContext, layer: int, site: str
) -> Tensor:
    """x: [s/tp, b, h] with sequence parallelism, else [s, b, h] -> the same with features dropped.

    Equal in every layout: the mask depends on global coordinates only.
    """
    rate = context.model.hidden_dropout
    if rate == 0.0 or not at.training:
        return x
    tokens = token_numbers(at.samples, at.index)
    if context.sequence_parallel:
        tokens = local_slice(tokens, context.tp)
    features = torch.arange(x.shape[-1], device=x.device)
    keep = keep_mask(key(context.seed, at.step, layer, site), tokens, features, rate)
    return _Drop.apply(x, keep, 1.0 / (1.0 - rate))
