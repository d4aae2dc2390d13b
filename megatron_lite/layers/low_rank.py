"""What LoRA adds to a linear layer and to the token table (arXiv:2106.09685), with tp's communication.

    column-parallel   A whole          B [out/tp, r]    h = A x before the ranks part, as x itself does
    row-parallel      A [r, in/tp]     B whole          h = A x is summed over tp, r numbers for each token
    token table       A [v/tp, r]      B whole          likewise

Each piece of a fused matrix (q, k, v; gate, up) has an A and a B of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_lite.blueprint.figure.parts import Matrix, Table
from megatron_lite.kernels.dropout import DropoutCall
from megatron_lite.kernels.low_rank import squared_lengths, sum_of_products, taken_apart
from megatron_lite.kernels.random import feature_bits
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.dropout import key_index
from megatron_lite.layers.packed import Weight, operand, values
from megatron_lite.layers.product import (
    Products,
    ShardedProduct,
    TPComm,
    row_product,
)
from megatron_lite.parallel.collectives import all_reduce, local_slice
from megatron_lite.parallel.regions import enter_split_features


class LowRankAdapter(nn.Module):
    """What is added to the output of a linear layer whose own weight is frozen.

    lora_A: [pieces * r, in], lora_B: [out, r] of the adapted pieces, one below the other; whole on
    each tp rank or cut, as above.  merged: the weight holds it already.
    """

    def __init__(self, context: StageContext, matrix: Matrix, layer: int) -> None:
        super().__init__()
        assert matrix.adapter is not None
        self.context, self.part = context, matrix.adapter
        tp, self.by_rows = context.tp.size, matrix.cut == "rows"
        split = tp if self.by_rows else 1
        adapted = dict(self.part.pieces)
        self.blocks = [(rows // split, name in adapted) for name, rows in matrix.pieces]
        self.rows = [rows for rows, has in self.blocks if has]
        columns = self.part.columns // (1 if self.by_rows else tp)
        self.lora_A = context.parameter(self.part.rank * len(adapted), columns)
        self.lora_B = context.parameter(sum(self.rows), self.part.rank)
        if self.part.magnitude:
            self.lora_magnitude = context.parameter(sum(self.rows), storage="fp32")
        self.products = Products.chosen(context)
        self.merged = False
        self._merged_by: list[Tensor] | None = None
        self._lengths: tuple[int, Tensor] | None = None
        if self.part.dropout:
            self.place = key_index(layer, self.part.name, context.model.num_layers)
            self.drop = context.choose("dropout")
            first = 0 if self.by_rows else context.tp.rank * columns
            numbers = torch.arange(first, first + columns, device=context.ctx.device)
            self.features = feature_bits(numbers)

    def forward(
        self, x: Tensor, y: Tensor, weight: Weight, bias: Tensor | None, at: ForwardContext | None
    ) -> Tensor:
        """x: what the layer was given, y: what it made of it by weight, and by bias where there is one."""
        if self.merged:
            return y
        if self.part.dropout and at is not None:
            x = self.drop(x, self._call(at))
        sizes = [rows for rows, _ in self.blocks]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        lengths = iter(self.relative_lengths(weight) if self.part.magnitude else ())
        deltas, found = iter(self._deltas(x)), []
        for block, shift, (_, adapted) in zip(y.split(sizes, -1), biases, self.blocks, strict=True):
            if not adapted:
                found.append(block)
            elif not self.part.magnitude:
                found.append(torch.add(block, next(deltas), alpha=self.part.scale))
            else:
                length, own = next(lengths), block if shift is None else block - shift
                longer, scaled = (length - 1.0).to(y.dtype), (length * self.part.scale).to(y.dtype)
                # so that nothing is changed, not even rounded otherwise, where every length is one
                found.append(block + own * longer + next(deltas) * scaled)
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def _deltas(self, x: Tensor) -> list[Tensor]:
        """B A x of each adapted piece, for the tokens and features of y."""
        at = self.context
        if not self.by_rows:
            h = row_product(x, self.lora_A, None, at, self.products)
            y = ShardedProduct.apply(h, self.lora_B, None, at.gradients, TPComm(), self.products)
            return [y]  # row-parallel matrices are not fused
        h = ShardedProduct.apply(x, self.lora_A, None, at.gradients, TPComm(), self.products)
        h = enter_split_features(h, at.tp, sequence=at.sequence_parallel)
        pairs = zip(h.split(self.part.rank, -1), self.lora_B.split(self.rows), strict=True)
        # rows of a parameter are no parameter: their gradient takes autograd's way into the accumulator
        return [
            ShardedProduct.apply(part, b, None, at.gradients, TPComm(), self.products)
            for part, b in pairs
        ]

    def _call(self, at: ForwardContext) -> DropoutCall | None:
        """The mask of x, a function of global coordinates as every mask."""
        if at.dropout is None:
            return None
        split = self.by_rows and self.context.sequence_parallel
        index = local_slice(at.index, self.context.tp) if split else at.index
        keys = at.dropout.keys
        return DropoutCall(self.part.dropout, keys[self.place], at.samples, index, self.features)

    def _pieces(self, weight: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(W, A, B) of each adapted piece, as this rank has them."""
        own = weight.split([rows for rows, _ in self.blocks])
        adapted = [part for part, (_, has) in zip(own, self.blocks, strict=True) if has]
        return list(
            zip(
                adapted, self.lora_A.split(self.part.rank), self.lora_B.split(self.rows),
                strict=True,
            )
        )  # fmt: skip

    def relative_lengths(self, weight: Weight) -> list[Tensor]:
        """m / |W + s B A| of each row, fp32; autograd takes the denominator for a constant."""
        with torch.no_grad():
            lengths = self.row_lengths(weight)
        return list((self.lora_magnitude / lengths).split(self.rows))

    @torch.no_grad()
    def row_lengths(self, weight: Weight) -> Tensor:
        """|W + s B A| of every adapted row, fp32.  Collective over tp where W is cut by its inputs."""
        s, found, whole = self.part.scale, [], values(weight)
        own = self._own_lengths(whole, operand(weight)._version).split(self.rows)
        for (w, a, b), squares in zip(self._pieces(whole), own, strict=True):
            found.append(squared_lengths(squares, w, a, b, s))
        total = torch.cat(found)
        if not self.by_rows:
            total = all_reduce(total, self.context.tp)
        return total.clamp_(min=0.0).sqrt_()

    def _own_lengths(self, weight: Tensor, version: int) -> Tensor:
        """|W|² of every adapted row here; anew only where the weight was written to."""
        if self._lengths is None or self._lengths[0] != version:
            lengths = [
                torch.linalg.vector_norm(w, dim=1, dtype=torch.float32).square()
                for w, _, _ in self._pieces(weight)
            ]
            self._lengths = version, torch.cat(lengths)
        return self._lengths[1]

    @torch.no_grad()
    def merge(self, weight: nn.Parameter) -> None:
        """Add it to the weight, which forward then takes as it is.  Collective over tp with magnitudes."""
        assert not self.merged
        lengths = self.relative_lengths(weight) if self.part.magnitude else None
        for n, (w, a, b) in enumerate(self._pieces(weight)):
            length = None if lengths is None else lengths[n]
            w.copy_(sum_of_products(w, a, b, self.part.scale, length))
        self.merged = True
        self._merged_by = lengths

    @torch.no_grad()
    def unmerge(self, weight: Tensor) -> None:
        """Take it out of the weight again, up to rounding in the weight's format."""
        assert self.merged
        lengths = self._merged_by
        for n, (w, a, b) in enumerate(self._pieces(weight)):
            length = None if lengths is None else lengths[n]
            w.copy_(taken_apart(w, a, b, self.part.scale, length))
        self.merged = False


class TableAdapter(nn.Module):
    """What is added to the rows of a frozen token table: lora_A [v/tp, r] looked up, times lora_B [h, r]."""

    def __init__(self, context: StageContext, table: Table) -> None:
        super().__init__()
        assert table.adapter is not None
        self.context, self.part = context, table.adapter
        rank = self.part.rank
        self.lora_A = context.parameter(table.rows // context.tp.size, rank)
        self.lora_B = context.parameter(table.columns, rank)
        self.products = Products.chosen(context)
        self.merged = False

    def forward(self, y: Tensor, look_up: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """y: [s/tp, b, h] or [s, b, h] of the table; look_up: finds the same tokens' rows of another one."""
        sink = self.context.gradients
        delta = ShardedProduct.apply(
            look_up(self.lora_A), self.lora_B, None, sink, TPComm(), self.products
        )
        return torch.add(y, delta, alpha=self.part.scale)

    @torch.no_grad()
    def merge(self, weight: Tensor) -> None:
        """Add it to the table, which forward then takes as it is."""
        assert not self.merged
        weight.copy_(sum_of_products(weight, self.lora_B.t(), self.lora_A, self.part.scale))
        self.merged = True

    @torch.no_grad()
    def unmerge(self, weight: Tensor) -> None:
        """Take it out of the table again."""
        assert self.merged
        weight.copy_(taken_apart(weight, self.lora_B.t(), self.lora_A, self.part.scale))
        self.merged = False
