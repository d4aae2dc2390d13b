"""Decoder: what one pipeline stage computes: optional embedding, blocks by global number, optional head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from megatron_lite.blueprint.figure.parts import Slowing
from megatron_lite.layers.around import around
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.cross_entropy import Scoring
from megatron_lite.layers.dropout import EMBEDDING_LAYER, HiddenDropout
from megatron_lite.layers.embedding import PositionEmbedding, VocabParallelEmbedding
from megatron_lite.layers.noise import with_noise
from megatron_lite.layers.norm import NormLayer
from megatron_lite.layers.outputs import Outputs
from megatron_lite.layers.product import Products
from megatron_lite.layers.recompute import recomputed
from megatron_lite.layers.stretching import RotarySlowing
from megatron_lite.models.gpt import GPTBlock
from megatron_lite.parallel.context import Axis
from megatron_lite.parallel.layer_hooks import LayerHooks


class Embedding(nn.Module):
    """Token table, and the position table where positions are learned.

    lookup=False makes the copy of the token table that a tied head on another stage multiplies with.
    """

    def __init__(self, context: StageContext, *, lookup: bool) -> None:
        super().__init__()
        self.context = context
        self.tokens = VocabParallelEmbedding(context, context.figure.tokens)
        positions = context.figure.positions if lookup else None
        self.positions = None if positions is None else PositionEmbedding(context, positions)

    def forward(self, tokens: Tensor, at: ForwardContext) -> Tensor:
        """tokens: int64 [s, b] -> [s/tp, b, h] with sequence parallelism, else [s, b, h]."""
        x = with_noise(self.tokens(tokens), at, self.context)
        return x if self.positions is None else x + self.positions(at.encoded)


class Head(nn.Module):
    """Output matrix of its own, [v/tp, h] of a vocabulary, else [n, h] on every tp rank."""

    def __init__(self, context: StageContext) -> None:
        super().__init__()
        self.part = context.figure.output
        (tensor,) = self.part.tensors()
        self.weight = context.parameter(*tensor.local(context.tp.size))


class Decoder(nn.Module):
    """The layers of one stage; parameters are named canonically but for the fused q/k/v and gate/up.

    lender: another stage on this rank, whose token table a tied head multiplies with, not with a copy;
    and whose learned frequencies this one uses.
    """

    def __init__(
        self,
        context: StageContext,
        layers: Sequence[int],
        *,
        has_embedding: bool,
        has_head: bool,
        lender: Decoder | None = None,
    ) -> None:
        super().__init__()
        self.context, self.has_embedding, self.has_head = context, has_embedding, has_head
        self.tied = context.figure.tied
        self.hooks: dict[str, LayerHooks] = {}
        self.borrowed: set[str] = set()
        slowing = context.figure.slowing
        self.rotary = None if slowing is None else self._slowing(slowing, lender)
        if has_embedding or (has_head and self.tied):
            self.embedding = Embedding(context, lookup=has_embedding)
        if has_embedding:
            self.dropout = HiddenDropout(context, EMBEDDING_LAYER, "embedding")
            self.drop = context.choose("dropout")
        if lender is not None and lender.has_embedding and has_head and self.tied:
            self.embedding.tokens.weight = lender.embedding.tokens.weight
            self.borrowed.add("embedding.tokens.weight")
        self.blocks = nn.ModuleDict({str(layer): GPTBlock(context, layer) for layer in layers})
        if has_head:
            self.products, self.scoring = Products.chosen(context), Scoring.chosen(context)
            self.final_norm = NormLayer(context, context.figure.final_norm)
            if not self.tied:
                self.head = Head(context)

    def _slowing(self, part: Slowing, lender: Decoder | None) -> RotarySlowing:
        if lender is None or lender.rotary is None:
            return RotarySlowing(self.context, part)
        self.borrowed |= {f"rotary.{name}" for name, _ in lender.rotary.named_parameters()}
        return lender.rotary

    @property
    def output_weight(self) -> nn.Parameter:
        """The matrix of the head, [v/tp, h] or [n, h]: its own, or the token table."""
        return self.embedding.tokens.weight if self.tied else self.head.weight

    def hook_layers(self, hooks_of: Callable[[Sequence[nn.Parameter]], LayerHooks | None]) -> None:
        """Have hooks called around each layer; hooks_of: by the parameters that the layer reads."""
        read = {name: list(block.parameters()) for name, block in self.blocks.items()}
        if self.has_embedding:
            read["embedding"] = list(self.embedding.parameters())
        if self.has_head:
            read["head"] = [*self.final_norm.parameters(), self.output_weight]
        made = {name: hooks_of(parameters) for name, parameters in read.items()}
        self.hooks = {name: hooks for name, hooks in made.items() if hooks is not None}

    def forward(
        self, x: Tensor, at: ForwardContext, score: Callable[[Outputs], Tensor] | None = None
    ) -> Tensor:
        """x: tokens int64 [s, b] on the first stage, else [s/tp, b, h] -> hidden, or with a head
        what score makes of its outputs; without score those: logits [s, b, v/tp], or [s, b, n]."""
        if self.rotary is not None:
            at = replace(at, slowed=self.rotary.factors(at))
        if self.has_embedding:
            x = around(self.hooks.get("embedding"), self._embed, x, at)
            if torch.is_grad_enabled() and not x.requires_grad:
                x.requires_grad_()  # the embedding is frozen, what comes after it has a backward
        x = self._run_blocks(x, at)
        return around(self.hooks.get("head"), self._end, x, score) if self.has_head else x

    def _embed(self, tokens: Tensor, at: ForwardContext) -> Tensor:
        x: Tensor = self.drop(self.embedding(tokens, at), self.dropout.call(at))
        return x

    def _end(self, x: Tensor, score: Callable[[Outputs], Tensor] | None) -> Tensor:
        x, weight = self.final_norm(x), self.output_weight
        outputs = Outputs(x, weight, self.context, self.products, self.scoring)
        return outputs.logits() if score is None else score(outputs)

    def _run_blocks(self, x: Tensor, at: ForwardContext) -> Tensor:
        """All blocks in order, in recomputed groups where that was asked for."""
        blocks, plan = list(self.blocks.items()), self.context.recompute
        axis = self.context.tp if plan.split else Axis("none")
        here = at.afresh()
        learned = at.slowed is not None and at.slowed.requires_grad

        def run(positions: range, x: Tensor) -> Tensor:
            # a dense mask is made once for these layers and lives as long as their graph, and so do
            # angles through which a gradient flows
            own = (here.afresh() if learned else here).unmasked()
            for index in positions:
                name, block = blocks[index]
                x = around(self.hooks.get(name), block, x, own)
            return x

        for positions, again in plan.groups(len(blocks)):
            x = recomputed(partial(run, positions), x, axis) if again else run(positions, x)
        return x
