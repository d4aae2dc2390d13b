"""VocabParallelEmbedding and learned positions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.blueprint.figure.parts import Table
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.gradients import WeightGradients
from megatron_lite.layers.low_rank import TableAdapter
from megatron_lite.parallel.collectives import local_slice
from megatron_lite.parallel.regions import reduce_from_tp, reduce_to_sequence


class _Lookup(torch.autograd.Function):
    """weight[ids]; the gradient goes to the rows without a dense copy of the table."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, sink: WeightGradients) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.sink = sink
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None]:
        ids, weight = ctx.saved_tensors
        return None, ctx.sink.rows(weight, ids, dy), None


class VocabParallelEmbedding(nn.Module):
    """Token table with its rows split over tp; W: [v/tp, h] of the padded vocabulary (arXiv:1909.08053 § 3).

    A rank looks up its own ids, gives zeros for the others', and the sum over tp is the embedding.
    """

    def __init__(self, context: StageContext, part: Table) -> None:
        super().__init__()
        self.context, self.part = context, part
        self.weight = context.parameter(part.rows // context.tp.size, part.columns)
        self.adapter = None if part.adapter is None else TableAdapter(context, part)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [s, b] -> [s/tp, b, h] with sequence parallelism, else [s, b, h].

        Every id must be below the padded vocabulary: data/ has checked that.
        """
        x = self._look_up(tokens, self.weight)
        if self.adapter is None or self.adapter.merged:
            return x
        return self.adapter(x, partial(self._look_up, tokens))

    def _look_up(self, tokens: Tensor, table: nn.Parameter) -> Tensor:
        """The tokens' rows of a table that is split over tp, summed."""
        at = self.context
        if at.tp.size == 1:
            return _Lookup.apply(tokens, table, at.gradients)
        rows = table.shape[0]
        local = tokens - at.tp.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        x = _Lookup.apply(local.masked_fill(elsewhere, 0), table, at.gradients)
        x = x.masked_fill(elsewhere[..., None], 0.0)  # also zeroes the gradient of row 0
        return reduce_to_sequence(x, at.tp) if at.sequence_parallel else reduce_from_tp(x, at.tp)


class PositionEmbedding(nn.Module):
    """Learned absolute positions; W: [positions, h], whole on every tp rank."""

    def __init__(self, context: StageContext, part: Table) -> None:
        super().__init__()
        self.context, self.part = context, part
        self.weight = context.parameter(part.rows, part.columns)

    def forward(self, index: Tensor) -> Tensor:
        """index: [s] or [s, b] -> [s/tp, 1 or b, h] with sequence parallelism, else [s, ...]."""
        at = self.context
        if at.sequence_parallel:
            index = local_slice(index, at.tp)
        x = _Lookup.apply(index, self.weight, at.gradients)
        return x[:, None] if index.dim() == 1 else x
