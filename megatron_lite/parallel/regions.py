"""The autograd pairs at the borders of tensor- and sequence-parallel regions (arXiv:1909.08053, 2205.05198).

name                    forward            backward
copy_to_tp (f)          identity           all-reduce
reduce_from_tp (g)      all-reduce         identity
gather_sequence         all-gather dim 0   reduce-scatter dim 0
join_sequence           all-gather dim 0   split dim 0
scatter_sequence        split dim 0        all-gather dim 0
reduce_to_sequence      reduce-scatter     all-gather dim 0
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lite.parallel.collectives import all_gather, all_reduce, local_slice, reduce_scatter
from megatron_lite.parallel.context import Axis


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        # a copy: autograd may hand the same gradient to another branch, as a residual stream does
        return all_reduce(dy.clone(memory_format=torch.contiguous_format), ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.mark_dirty(x)
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(dy, ctx.axis), None


class _JoinSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return local_slice(dy, ctx.axis).contiguous(), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return local_slice(x, axis).contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return all_gather(dy, ctx.axis), None


class _ReduceToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return all_gather(dy, ctx.axis), None


def copy_to_tp(x: Tensor, axis: Axis) -> Tensor:
    """x: [s, b, h] -> the same; its gradient is summed over the axis."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce_from_tp(x: Tensor, axis: Axis) -> Tensor:
    """x: [s, b, h] partial -> summed over the axis (in place); its gradient passes unchanged."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def gather_sequence(x: Tensor, axis: Axis) -> Tensor:
    """x: [s/tp, b, h] -> [s, b, h] in front of a region that computes differently on each rank."""
    return x if axis.size == 1 else _GatherSequence.apply(x, axis)


def join_sequence(x: Tensor, axis: Axis) -> Tensor:
    """x: [s/tp, b, n] -> [s, b, n] in front of a region that computes the same on each rank."""
    return x if axis.size == 1 else _JoinSequence.apply(x, axis)


def scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """x: [s, b, h] equal on all ranks -> [s/tp, b, h]."""
    return x if axis.size == 1 else _ScatterSequence.apply(x, axis)


def reduce_to_sequence(x: Tensor, axis: Axis) -> Tensor:
    """x: [s, b, h] partial -> [s/tp, b, h] summed over the axis."""
    return x if axis.size == 1 else _ReduceToSequence.apply(x, axis)
