"""ColumnParallelLinear and RowParallelLinear (arXiv:1909.08053 § 3), with communication under computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_lite.blueprint.figure.parts import Format, Matrix
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.gradients import (
    DeferredWgrad,
    WeightGradients,
    WgradOperand,
    WgradProduct,
)
from megatron_lite.parallel.collectives import (
    Pending,
    all_gather,
    reduce_scatter,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_lite.parallel.context import Axis
from megatron_lite.parallel.regions import join_sequence, reduce_from_tp
from megatron_lite.parallel.shard import DTYPES

_NO_AXIS = Axis("none")


class TPComm(NamedTuple):
    """Axes over which a linear layer communicates; see _Linear."""

    gather_input: Axis = _NO_AXIS
    scatter_output: Axis = _NO_AXIS
    reduce_input_grad: Axis = _NO_AXIS

    def start_reduce(self, dx: Tensor) -> Pending:
        """Begin summing the gradient of the whole input [s, b, in], to what the layer was given."""
        if self.gather_input.size > 1:
            return start_reduce_scatter(dx, self.gather_input)
        return start_all_reduce(dx, self.reduce_input_grad)


def column_comm(context: StageContext) -> TPComm:
    """In front of features that are split over tp."""
    tp = context.tp
    return TPComm(gather_input=tp) if context.sequence_parallel else TPComm(reduce_input_grad=tp)


class Products(NamedTuple):
    """The kernels of a linear layer's three products; see kernels/reference.py."""

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    input_gradient: Callable[[Tensor, Tensor], Tensor]
    weight_gradient: WgradProduct

    @classmethod
    def chosen(cls, context: StageContext, storage: Format | None = None) -> Products:
        """For a weight stored in the run's number format, or in one of its own."""
        kept_as = None if storage is None else DTYPES[storage]
        return cls(*(context.choose(f"linear_{name}", storage=kept_as) for name in cls._fields))


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, its input and output each whole or split along the sequence.

    Communication is here, the products are kernels.

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
        comm: TPComm,
        products: Products,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.comm, ctx.products = sink, comm, products
        y = products.forward(all_gather(x, comm.gather_input), weight, bias)
        return reduce_scatter(y, comm.scatter_output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        sink, comm, products = ctx.sink, ctx.comm, ctx.products
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        later = needs_weight and sink.defers(weight)
        if later:
            sink.defer(
                DeferredWgrad(
                    weight,
                    WgradOperand(dy, comm.scatter_output),
                    WgradOperand(x, comm.gather_input),
                    products.weight_gradient,
                )
            )
        gathered_dy = start_all_gather(dy, comm.scatter_output)
        gathered_x = None if later else start_all_gather(x, comm.gather_input)
        dy = gathered_dy.wait()
        pending = None
        if needs_x:
            pending = comm.start_reduce(products.input_gradient(dy, weight))
        dw = None
        if needs_weight and gathered_x is not None:
            dw = sink.matrix(weight, dy, gathered_x.wait(), products.weight_gradient)
        db = dy.sum(tuple(range(dy.dim() - 1))) if needs_bias else None
        return (pending.wait() if pending is not None else None), dw, db, None, None, None


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
        self.products = Products.chosen(context, part.storage)

    def forward(self, x: Tensor) -> Tensor:
        """x: [s/tp, b, in] with sequence parallelism, else [s, b, in] -> [s, b, out/tp]."""
        at = self.context
        comm = column_comm(at)
        return _Linear.apply(x, self.weight, self.bias, at.gradients, comm, self.products)


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with the inputs split over tp; W: [out, in/tp]; b is whole and added once.

    The ranks' products are summed over tp (arXiv:1909.08053 § 3), with sequence parallelism into
    slices of the sequence (arXiv:2205.05198 § 4.2.2).  The bias of a sum is left to the kernel that
    adds it to the stream: late_bias.
    """

    def __init__(self, context: StageContext, part: Matrix) -> None:
        super().__init__()
        self.context, self.part = context, part
        self.rows = [rows for _, rows in part.pieces]
        self.weight = context.parameter(
            part.rows, part.columns // context.tp.size, storage=part.storage
        )
        self.bias = context.parameter(part.rows) if part.bias else None
        self.products = Products.chosen(context, part.storage)

    @property
    def late_bias(self) -> nn.Parameter | None:
        """The bias that forward() has not added; None where there is none, or nothing was summed over tp."""
        return None if self.context.tp.size == 1 else self.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: [s, b, in/tp] -> [s/tp, b, out] with sequence parallelism, else [s, b, out]; see late_bias."""
        at, products = self.context, self.products
        if at.tp.size == 1:  # nothing comes between the product and the bias
            return _Linear.apply(x, self.weight, self.bias, at.gradients, TPComm(), products)
        comm = TPComm(scatter_output=at.tp) if at.sequence_parallel else TPComm()
        y = _Linear.apply(x, self.weight, None, at.gradients, comm, products)
        return y if at.sequence_parallel else reduce_from_tp(y, at.tp)


def project_to_vocabulary(
    x: Tensor, weight: Tensor, context: StageContext, products: Products
) -> Tensor:
    """x: [s/tp, b, h] with sequence parallelism, else [s, b, h]; weight [v/tp, h] -> [s, b, v/tp].

    The logits of this rank's part of the vocabulary, padding included; cross_entropy.py masks it.
    """
    comm = column_comm(context)
    return _Linear.apply(x, weight, None, context.gradients, comm, products)


def project_whole(x: Tensor, weight: Tensor, context: StageContext, products: Products) -> Tensor:
    """x: [s/tp, b, h] with sequence parallelism, else [s, b, h]; weight [n, h], whole on every tp rank,
    -> [s, b, n], equal on all of them.

    With the sequence split a rank computes its tokens alone, and its gradient is their share.
    """
    y = _Linear.apply(x, weight, None, context.gradients, TPComm(), products)
    return join_sequence(y, context.tp) if context.sequence_parallel else y
