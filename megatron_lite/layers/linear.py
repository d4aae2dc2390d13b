"""ColumnParallelLinear and RowParallelLinear (arXiv:1909.08053 § 3), with communication under computation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.blueprint.figure.parts import Matrix
from megatron_lite.layers.gradients import Factor, Product, WeightGradients
from megatron_lite.layers.setting import Setting
from megatron_lite.parallel.collectives import (
    all_gather,
    reduce_scatter,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_lite.parallel.context import Axis
from megatron_lite.parallel.regions import reduce_from_tp

_ALONE = Axis("none")


class _Ends(NamedTuple):
    """Axes over which a linear layer communicates; see _Linear."""

    enters: Axis = _ALONE
    leaves: Axis = _ALONE
    summed: Axis = _ALONE


def _column_ends(setting: Setting) -> _Ends:
    """In front of features that are split over tp."""
    tp = setting.tp
    return _Ends(enters=tp) if setting.sequence_parallel else _Ends(summed=tp)


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, its input and output each whole or split along the sequence.

    W may be stored in another number format than x: it is converted where it is used.

    enters: x is [s/n, b, in] over this axis and gathered, in backward again: keeping the gathered
    input would cost what sequence parallelism saves.  leaves: y is a partial sum, reduce-scattered
    to [s/n, b, out].  summed: where x is whole, the axis over which its gradient is all-reduced.
    An input gradient's collective runs under the weight gradient's product, where that is computed
    now; one that waits for its W keeps the slices.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sink: WeightGradients,
        ends: _Ends,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.ends = sink, ends
        y = F.linear(all_gather(x, ends.enters), weight.to(x.dtype), bias)
        return reduce_scatter(y, ends.leaves)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        sink, ends = ctx.sink, ctx.ends
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        later = needs_weight and sink.postpones(weight)
        if later:
            sink.leave(Product(weight, Factor(dy, ends.leaves), Factor(x, ends.enters)))
        gathered_dy = start_all_gather(dy, ends.leaves)
        gathered_x = None if later else start_all_gather(x, ends.enters)
        dy = gathered_dy.wait()
        pending = None
        if needs_x:
            dx = dy @ weight.to(dy.dtype)
            pending = (
                start_reduce_scatter(dx, ends.enters)
                if ends.enters.size > 1
                else start_all_reduce(dx, ends.summed)
            )
        dw = None
        if needs_weight and gathered_x is not None:
            dw = sink.matrix(weight, dy, gathered_x.wait())
        db = dy.sum(tuple(range(dy.dim() - 1))) if needs_bias else None
        return (pending.wait() if pending is not None else None), dw, db, None, None


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b with the outputs split over tp; W: [out/tp, in] (arXiv:1909.08053 § 3).

    rows: of each piece fused in it (q, k, v) on this rank; each is split over tp by itself.
    """

    def __init__(self, setting: Setting, part: Matrix) -> None:
        super().__init__()
        self.setting, self.part = setting, part
        self.rows = [rows // setting.tp.size for _, rows in part.pieces]
        self.weight = setting.parameter(sum(self.rows), part.columns, storage=part.storage)
        self.bias = setting.parameter(sum(self.rows)) if part.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [s/tp, b, in] with sequence parallelism, else [s, b, in] -> [s, b, out/tp]."""
        at = self.setting
        return _Linear.apply(x, self.weight, self.bias, at.gradients, _column_ends(at))


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with the inputs split over tp; W: [out, in/tp]; b is whole and added once.

    The ranks' products are summed over tp (arXiv:1909.08053 § 3), with sequence parallelism into
    slices of the sequence (arXiv:2205.05198 § 4.2.2).
    """

    def __init__(self, setting: Setting, part: Matrix) -> None:
        super().__init__()
        self.setting, self.part = setting, part
        self.rows = [rows for _, rows in part.pieces]
        self.weight = setting.parameter(
            part.rows, part.columns // setting.tp.size, storage=part.storage
        )
        self.bias = setting.parameter(part.rows) if part.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [s, b, in/tp] -> [s/tp, b, out] with sequence parallelism, else [s, b, out]."""
        at = self.setting
        if at.tp.size == 1:  # nothing comes between the product and the bias
            return _Linear.apply(x, self.weight, self.bias, at.gradients, _Ends())
        ends = _Ends(leaves=at.tp) if at.sequence_parallel else _Ends()
        y = _Linear.apply(x, self.weight, None, at.gradients, ends)
        y = y if at.sequence_parallel else reduce_from_tp(y, at.tp)
        return y if self.bias is None else y + self.bias


def project_to_vocabulary(x: Tensor, weight: Tensor, setting: Setting) -> Tensor:
    """x: [s/tp, b, h] with sequence parallelism, else [s, b, h]; weight [v/tp, h] -> [s, b, v/tp].

    The logits of this rank's part of the vocabulary, padding included; cross_entropy masks it.
    """
    return _Linear.apply(x, weight, None, setting.gradients, _column_ends(setting))
