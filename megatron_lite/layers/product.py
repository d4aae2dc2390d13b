"""x Wᵀ + b with its communication: the autograd function that all linear layers are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lite.blueprint.figure.parts import Format
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
from megatron_lite.parallel.regions import reduce_from_tp
from megatron_lite.parallel.shard import DTYPES

_NO_AXIS = Axis("none")


class TPComm(NamedTuple):
    """Axes over which a linear layer communicates; see ShardedProduct."""

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


class ShardedProduct(torch.autograd.Function):
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
        """x: [..., in], whole or split as above; weight: [out, in] here -> y; sink takes its gradient."""
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.comm, ctx.products = sink, comm, products
        y = products.forward(all_gather(x, comm.gather_input), weight, bias)
        return reduce_scatter(y, comm.scatter_output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias, of what needs one."""
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
        now = needs_weight and not later
        gathered_x = start_all_gather(x, comm.gather_input) if now else None
        dy = gathered_dy.wait()
        pending = None
        if needs_x:
            pending = comm.start_reduce(products.input_gradient(dy, weight))
        dw = None
        if gathered_x is not None:
            dw = sink.matrix(weight, dy, gathered_x.wait(), products.weight_gradient)
        db = dy.sum(tuple(range(dy.dim() - 1))) if needs_bias else None
        return (pending.wait() if pending is not None else None), dw, db, None, None, None


def row_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, context: StageContext, products: Products
) -> Tensor:
    """x: [s, b, in/tp], weight: [out, in/tp] -> the sum over tp: [s/tp, b, out] with sequence parallelism,
    else [s, b, out].  bias: where nothing is summed."""
    scatters = context.sequence_parallel
    comm = TPComm(scatter_output=context.tp) if scatters else TPComm()
    y = ShardedProduct.apply(x, weight, bias, context.gradients, comm, products)
    return y if scatters else reduce_from_tp(y, context.tp)
