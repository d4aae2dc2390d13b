"""ColumnParallelLinear and RowParallelLinear (arXiv:1909.08053 § 3), with communication under computation."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_lite.blueprint.figure.parts import Matrix
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.low_rank import LowRankAdapter
from megatron_lite.layers.packed import matrix_weight, operand
from megatron_lite.layers.product import (
    Products,
    ShardedProduct,
    TPComm,
    column_comm,
    row_product,
)
from megatron_lite.parallel.regions import join_sequence


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b with the outputs split over tp; W: [out/tp, in] (arXiv:1909.08053 § 3).

    rows: of each piece fused in it (q, k, v) on this rank; each is split over tp by itself.
    layer: for the dropout of its adapter.
    """

    def __init__(self, context: StageContext, part: Matrix, layer: int = 0) -> None:
        super().__init__()
        self.context, self.part = context, part
        self.rows = [rows // context.tp.size for _, rows in part.pieces]
        self.weight, self.products = matrix_weight(context, part, sum(self.rows), part.columns)
        self.bias = context.parameter(sum(self.rows)) if part.bias else None
        self.adapter = None if part.adapter is None else LowRankAdapter(context, part, layer)

    def forward(self, x: Tensor, at: ForwardContext | None = None) -> Tensor:
        """x: [s/tp, b, in] with sequence parallelism, else [s, b, in] -> [s, b, out/tp].

        at: for the dropout of an adapter.
        """
        here = self.context
        comm = column_comm(here)
        weight = operand(self.weight)
        y = ShardedProduct.apply(x, weight, self.bias, here.gradients, comm, self.products)
        return y if self.adapter is None else self.adapter(x, y, self.weight, self.bias, at)


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with the inputs split over tp; W: [out, in/tp]; b is whole and added once.

    The ranks' products are summed over tp (arXiv:1909.08053 § 3), with sequence parallelism into
    slices of the sequence (arXiv:2205.05198 § 4.2.2).  The bias of a sum is left to the kernel that
    adds it to the stream: late_bias.
    """

    def __init__(self, context: StageContext, part: Matrix, layer: int = 0) -> None:
        super().__init__()
        self.context, self.part = context, part
        self.rows = [rows for _, rows in part.pieces]
        columns = part.columns // context.tp.size
        self.weight, self.products = matrix_weight(context, part, part.rows, columns)
        self.bias = context.parameter(part.rows) if part.bias else None
        self.adapter = None if part.adapter is None else LowRankAdapter(context, part, layer)

    @property
    def late_bias(self) -> nn.Parameter | None:
        """The bias that forward() has not added; None where there is none, or nothing was summed over tp."""
        return None if self.context.tp.size == 1 else self.bias

    def forward(self, x: Tensor, at: ForwardContext | None = None) -> Tensor:
        """x: [s, b, in/tp] -> [s/tp, b, out] with sequence parallelism, else [s, b, out]; see late_bias.

        at: for the dropout of an adapter.
        """
        here = self.context
        # on one rank nothing comes between the product and the bias
        bias = self.bias if here.tp.size == 1 else None
        y = row_product(x, operand(self.weight), bias, here, self.products)
        return y if self.adapter is None else self.adapter(x, y, self.weight, bias, at)


def project_to_vocabulary(
    x: Tensor, weight: Tensor, context: StageContext, products: Products
) -> Tensor:
    """x: [s/tp, b, h] with sequence parallelism, else [s, b, h]; weight [v/tp, h] -> [s, b, v/tp].

    The logits of this rank's part of the vocabulary, padding included; cross_entropy.py masks it.
    """
    comm = column_comm(context)
    return ShardedProduct.apply(x, weight, None, context.gradients, comm, products)


def project_whole(x: Tensor, weight: Tensor, context: StageContext, products: Products) -> Tensor:
    """x: [s/tp, b, h] with sequence parallelism, else [s, b, h]; weight [n, h], whole on every tp rank,
    -> [s, b, n], equal on all of them.

    With the sequence split a rank computes its tokens alone, and its gradient is their share.
    """
    y = ShardedProduct.apply(x, weight, None, context.gradients, TPComm(), products)
    return join_sequence(y, context.tp) if context.sequence_parallel else y
