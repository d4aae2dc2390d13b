"""ColumnParallelLinear and RowParallelLinear (arXiv:1909.08053 § 3), with communication under computation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.blueprint.figure.parts import Matrix
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.gradients import DeferredWgrad, WeightGradients, WgradOperand
from megatron_lite.parallel.collectives import (
    all_gather,
    reduce_scatter,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_lite.parallel.context import Axis
from megatron_lite.parallel.regions import join_sequence, reduce_from_tp

_NO_AXIS = Axis("none")


class _TPComm(NamedTuple):
    """Axes over which a linear layer communicates; see _Linear."""

    gather_input: Axis = _NO_AXIS
    scatter_output: Axis = _NO_AXIS
    reduce_input_grad: Axis = _NO_AXIS


def _column_comm(context: StageContext) -> _TPComm:
    """In front of features that are split over tp."""
    tp = context.tp
    return _TPComm(gather_input=tp) if context.sequence_parallel else _TPComm(reduce_input_grad=tp)


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, its input and output each whole or split along the sequence.

    W may be stored in another number format than x: it is converted where it is used.

    gather_input: x is [s/n, b, in] over this axis and gathered, in backward again: keeping the gathered
    input would cost what sequence parallelism saves.  scatter_output: y is a partial sum, reduce-scattered
    to [s/n, b, out].  reduce_input_grad: where x is whole, the axis over which its gradient is all-reduced.
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
        comm: _TPComm,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.comm = sink, comm
        y = F.linear(all_gather(x, comm.gather_input), weight.to(x.dtype), bias)
        return reduce_scatter(y, comm.scatter_output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        sink, comm = ctx.sink, ctx.comm
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        later = needs_weight and sink.defers(weight)
        if later:
            sink.defer(
                DeferredWgrad(
                    weight,
                    WgradOperand(dy, comm.scatter_output),
                    WgradOperand(x, comm.gather_input),
                )
            )
        gathered_dy = start_all_gather(dy, comm.scatter_output)
        gathered_x = None if later else start_all_gather(x, comm.gather_input)
        dy = gathered_dy.wait()
        pending = None
        if needs_x:
            dx = dy @ weight.to(dy.dtype)
            pending = (
                start_reduce_scatter(dx, comm.gather_input)
                if comm.gather_input.size > 1
                else start_all_reduce(dx, comm.reduce_input_grad)
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

    def __init__(self, context: StageContext, part: Matrix) -> None:
        super().__init__()
        self.context, self.part = context, part
        self.rows = [rows // context.tp.size for _, rows in part.pieces]
        self.weight = context.parameter(sum(self.rows), part.columns, storage=part.storage)
        self.bias = context.parameter(sum(self.rows)) if part.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [s/tp, b, in] with sequence parallelism, else [s, b, in] -> [s, b, out/tp]."""
        at = self.context
        return _Linear.apply(x, self.weight, self.bias, at.gradients, _column_comm(at))


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with the inputs split over tp; W: [out, in/tp]; b is whole and added once.

    The ranks' products are summed over tp (arXiv:1909.08053 § 3), with sequence parallelism into
    slices of the sequence (arXiv:2205.05198 § 4.2.2).
    """

    def __init__(self, context: StageContext, part: Matrix) -> None:
        super().__init__()
        self.context, self.part = context, part
        self.rows = [rows for _, rows in part.pieces]
        self.weight = context.parameter(
            part.rows, part.columns // context.tp.size, storage=part.storage
        )
        self.bias = context.parameter(part.rows) if part.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [s, b, in/tp] -> [s/tp, b, out] with sequence parallelism, else [s, b, out]."""
        at = self.context
        if at.tp.size == 1:  # nothing comes between the product and the bias
            return _Linear.apply(x, self.weight, self.bias, at.gradients, _TPComm())
        comm = _TPComm(scatter_output=at.tp) if at.sequence_parallel else _TPComm()
        y = _Linear.apply(x, self.weight, None, at.gradients, comm)
        y = y if at.sequence_parallel else reduce_from_tp(y, at.tp)
        return y if self.bias is None else y + self.bias


def project_to_vocabulary(x: Tensor, weight: Tensor, context: StageContext) -> Tensor:
    """x: [s/tp, b, h] with sequence parallelism, else [s, b, h]; weight [v/tp, h] -> [s, b, v/tp].

    The logits of this rank's part of the vocabulary, padding included; cross_entropy masks it.
    """
    return _Linear.apply(x, weight, None, context.gradients, _column_comm(context))


def project_whole(x: Tensor, weight: Tensor, context: StageContext) -> Tensor:
    """x: [s/tp, b, h] with sequence parallelism, else [s, b, h]; weight [n, h], whole on every tp rank,
    -> [s, b, n], equal on all of them.

    With the sequence split a rank computes its tokens alone, and its gradient is their share.
    """
    y = _Linear.apply(x, weight, None, context.gradients, _TPComm())
    return join_sequence(y, context.tp) if context.sequence_parallel else y
