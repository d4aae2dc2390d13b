"""A frozen matrix kept in 4 bits and unpacked for each product that reads it (arXiv:2305.14314).

It is no parameter: no engine, gradient or optimizer knows of it.  models/packing.py fills it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_lite.blueprint.figure.parts import Matrix
from megatron_lite.config.sections.lora import NF4_BLOCK
from megatron_lite.kernels import nf4
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.product import Products


class PackedWeight(nn.Module):
    """W: [rows, columns] of this rank as codes and scales, see kernels/nf4.py; zeros until pack()."""

    codes: Tensor
    absmax: Tensor

    def __init__(self, context: StageContext, rows: int, columns: int) -> None:
        super().__init__()
        self.shape, self.dtype, device = (rows, columns), context.dtype, context.ctx.device
        self.register_buffer(
            "codes", torch.zeros(rows, columns // 2, dtype=torch.uint8, device=device)
        )
        self.register_buffer("absmax", torch.zeros(rows, columns // NF4_BLOCK, device=device))
        self.pairs = nf4.quantile_pairs(device)
        self._unpack = context.choose("unpack_nf4")

    def pack(self, weight: Tensor) -> None:
        """Keep these values, [rows, columns]."""
        for kept, new in zip((self.codes, self.absmax), nf4.pack(weight, NF4_BLOCK), strict=True):
            kept.copy_(new)

    def unpack(self) -> Tensor:
        """[rows, columns] in the run's number format."""
        whole: Tensor = self._unpack(self.codes, self.absmax, self.pairs, self.dtype)
        return whole

    def products(self, plain: Products) -> Products:
        """The same for an operand that is the codes: what autograd keeps for backward is these alone."""

        def forward(x: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
            return plain.forward(x, self.unpack(), bias)

        def input_gradient(dy: Tensor, codes: Tensor) -> Tensor:
            return plain.input_gradient(dy, self.unpack())

        return Products(forward, input_gradient, plain.weight_gradient)


Weight = nn.Parameter | PackedWeight


def matrix_weight(
    context: StageContext, part: Matrix, rows: int, columns: int
) -> tuple[Weight, Products]:
    """A matrix as its part wants it kept, and the kernels of its products."""
    if part.storage != "nf4":
        weight = context.parameter(rows, columns, storage=part.storage)
        return weight, Products.chosen(context, part.storage)
    packed = PackedWeight(context, rows, columns)
    return packed, packed.products(Products.chosen(context))


def operand(weight: Weight) -> Tensor:
    """What a product is given of it."""
    return weight.codes if isinstance(weight, PackedWeight) else weight


def values(weight: Weight) -> Tensor:
    """Its values, where they are needed themselves: the parameter, or unpacked."""
    return weight.unpack() if isinstance(weight, PackedWeight) else weight
