"""ColumnParallelLinear and RowParallelLinear (arXiv:1909.08053 § 3), with communication under computation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.layers.gradients import WeightGradients
from megatron_lite.layers.setting import Setting
from megatron_lite.parallel.collectives import (
    all_gather,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_lite.parallel.context import Axis
from megatron_lite.parallel.regions import reduce_from_tp, reduce_to_sequence


class _Linear(torch.autograd.Function):
    """x Wᵀ + b where x is equal on all tp ranks (axis of size > 1) or already local (size 1).

    With `split`, x is [s/tp, b, in] and is gathered, in backward again: keeping the gathered input
    would cost what sequence parallelism saves.  The input gradient's collective runs under the
    weight gradient's matrix product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sink: WeightGradients,
        axis: Axis,
        split: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.axis, ctx.split = sink, axis, split
        return F.linear(all_gather(x, axis) if split else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        axis, split = ctx.axis, ctx.split
        gathered = start_all_gather(x, axis) if split else None
        pending = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            pending = start_reduce_scatter(dx, axis) if split else start_all_reduce(dx, axis)
        whole = gathered.wait() if gathered is not None else x
        dw = ctx.sink.matrix(weight, dy, whole) if ctx.needs_input_grad[1] else None
        db = dy.sum(tuple(range(dy.dim() - 1))) if ctx.needs_input_grad[2] else None
        return (pending.wait() if pending is not None else None), dw, db, None, None, None


_ALONE = Axis("none")


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b with the outputs split over tp; W: [out/tp, in] (arXiv:1909.08053 § 3).

    parts: sizes of the canonical tensors fused in it (q, k, v), each split over tp by itself.
    """

    def __init__(
        self, setting: Setting, fan_in: int, parts: dict[str, int], *, bias: bool = True
    ) -> None:
        super().__init__()
        self.setting = setting
        self.parts = {name: size // setting.tp.size for name, size in parts.items()}
        rows = sum(self.parts.values())
        self.weight = setting.parameter(rows, fan_in, tp_dim=0)
        self.bias = setting.parameter(rows, tp_dim=0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [s/tp, b, in] with sequence parallelism, else [s, b, in] -> [s, b, out/tp]."""
        at = self.setting
        split = at.sequence_parallel and at.tp.size > 1
        return _Linear.apply(x, self.weight, self.bias, at.gradients, at.tp, split)


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with the inputs split over tp; W: [out, in/tp]; b is whole and added once.

    The ranks' products are summed over tp (arXiv:1909.08053 § 3), with sequence parallelism into
    slices of the sequence (arXiv:2205.05198 § 4.2.2).
    """

    def __init__(self, setting: Setting, fan_in: int, fan_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.setting = setting
        self.weight = setting.parameter(fan_out, fan_in // setting.tp.size, tp_dim=1)
        self.bias = setting.parameter(fan_out, partial=True) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [s, b, in/tp] -> [s/tp, b, out] with sequence parallelism, else [s, b, out]."""
        at = self.setting
        if at.tp.size == 1:  # nothing comes between the product and the bias
            return _Linear.apply(x, self.weight, self.bias, at.gradients, _ALONE, False)
        y = _Linear.apply(x, self.weight, None, at.gradients, _ALONE, False)
        y = reduce_to_sequence(y, at.tp) if at.sequence_parallel else reduce_from_tp(y, at.tp)
        return y if self.bias is None else y + self.bias


def project_to_vocabulary(x: Tensor, weight: Tensor, setting: Setting) -> Tensor:
    """x: [s/tp, b, h] with sequence parallelism, else [s, b, h]; weight [v/tp, h] -> [s, b, v/tp].

    The logits of this rank's part of the vocabulary, padding included; cross_entropy masks it.
    """
    split = setting.sequence_parallel and setting.tp.size > 1
    return _Linear.apply(x, weight, None, setting.gradients, setting.tp, split)
