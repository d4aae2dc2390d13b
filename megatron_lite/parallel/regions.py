"""The autograd pairs at the borders of tensor- and sequence-parallel regions (arXiv:1909.08053, 2205.05198).

name                    forward            backward
reduce_from_tp (g)      all-reduce         identity
join_sequence           all-gather dim 0   split dim 0
reduce_to_sequence      reduce-scatter     all-gather dim 0
enter_split_features    identity           all-reduce; with the sequence split all-gather, reduce-scatter
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lite.parallel.collectives import all_gather, all_reduce, local_slice, reduce_scatter
from megatron_lite.parallel.context import Axis


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.mark_dirty(x)
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _JoinSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return local_slice(dy, ctx.axis).contiguous(), None


class _ReduceToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return all_gather(dy, ctx.axis), None


class _EnterSplitFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sequence: bool) -> Tensor:
        ctx.axis, ctx.sequence = axis, sequence
        return all_gather(x, axis) if sequence else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        if ctx.sequence:
            return reduce_scatter(dy.contiguous(), ctx.axis), None, None
        # a copy: the sum is made in place, and autograd may still need what it was given
        return all_reduce(dy.contiguous().clone(), ctx.axis), None, None


def reduce_from_tp(x: Tensor, axis: Axis) -> Tensor:
    """x: [s, b, h] partial -> summed over the axis (in place); its gradient passes unchanged."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def join_sequence(x: Tensor, axis: Axis) -> Tensor:
    """x: [s/tp, b, n] -> [s, b, n] in front of a region that computes the same on each rank."""
    return x if axis.size == 1 else _JoinSequence.apply(x, axis)


def reduce_to_sequence(x: Tensor, axis: Axis) -> Tensor:
    """x: [s, b, h] partial -> [s/tp, b, h] summed over the axis."""
    return x if axis.size == 1 else _ReduceToSequence.apply(x, axis)


def enter_split_features(x: Tensor, axis: Axis, *, sequence: bool) -> Tensor:
    """x: [s/tp, b, n] with the sequence split, else [s, b, n] -> [s, b, n] in front of a product whose outputs
    are split: each rank's gradient is its features' share."""
    return x if axis.size == 1 else _EnterSplitFeatures.apply(x, axis, sequence)
