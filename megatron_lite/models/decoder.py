"""Decoder: what one pipeline stage computes: optional embedding, blocks by global number, optional head."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from megatron_lite.layers.dropout import hidden_dropout
from megatron_lite.layers.embedding import PositionEmbedding, VocabParallelEmbedding
from megatron_lite.layers.linear import project_to_vocabulary
from megatron_lite.layers.norm import Norm
from megatron_lite.layers.recompute import recomputed
from megatron_lite.layers.setting import Positions, Setting
from megatron_lite.models.gpt import GPTBlock
from megatron_lite.parallel.context import Axis
from megatron_lite.parallel.random import key, normal
from megatron_lite.parallel.shard import Kind, LocalParameter, Piece

EMBEDDING_LAYER = -1
"""The layer number of the embedding's dropout."""


class Embedding(nn.Module):
    """Token table, and the position table where positions are learned.

    lookup=False makes the copy of the token table that a tied head on another stage multiplies with.
    """

    def __init__(self, setting: Setting, *, lookup: bool) -> None:
        super().__init__()
        self.tokens = VocabParallelEmbedding(setting)
        learned = lookup and setting.model.position_embedding_type == "learned_absolute"
        self.positions = PositionEmbedding(setting) if learned else None

    def forward(self, tokens: Tensor, at: Positions) -> Tensor:
        """tokens: int64 [s, b] -> [s/tp, b, h] with sequence parallelism, else [s, b, h]."""
        x = self.tokens(tokens)
        return x if self.positions is None else x + self.positions(at.encoded)


class Head(nn.Module):
    """Output matrix of its own, [v/tp, h], where the embedding is not tied."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        rows = setting.padded_vocab_size // setting.tp.size
        self.weight = setting.parameter(rows, setting.model.hidden_size, tp_dim=0)


class Decoder(nn.Module):
    """The layers of one stage; parameters are named canonically but for the fused q/k/v and gate/up.

    table: the token table of another stage on this rank; a tied head multiplies with it, not with
    a copy.
    """

    def __init__(
        self,
        setting: Setting,
        layers: Sequence[int],
        *,
        has_embedding: bool,
        has_head: bool,
        table: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.setting, self.has_embedding, self.has_head = setting, has_embedding, has_head
        self.tied = not setting.model.untie_embeddings_and_output_weights
        if has_embedding or (has_head and self.tied):
            self.embedding = Embedding(setting, lookup=has_embedding)
        self.borrows_table = table is not None and has_head and self.tied
        if table is not None and self.borrows_table:
            self.embedding.tokens.weight = table
        self.blocks = nn.ModuleDict({str(layer): GPTBlock(setting, layer) for layer in layers})
        if has_head:
            self.final_norm = Norm(setting)
            if not self.tied:
                self.head = Head(setting)

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        """x: tokens int64 [s, b] on the first stage, else [s/tp, b, h] -> hidden, or logits [s, b, v/tp]."""
        if self.has_embedding:
            x = hidden_dropout(
                self.embedding(x, at), at, self.setting, EMBEDDING_LAYER, "embedding"
            )
        x = self._run_blocks(x, at)
        if not self.has_head:
            return x
        x = self.final_norm(x)
        weight = self.embedding.tokens.weight if self.tied else self.head.weight
        return project_to_vocabulary(x, weight, self.setting)

    def _run_blocks(self, x: Tensor, at: Positions) -> Tensor:
        """All blocks in order, in recomputed groups where that was asked for."""
        blocks, plan = list(self.blocks.values()), self.setting.recompute
        axis = self.setting.tp if plan.split else Axis("none")

        def run(positions: range, x: Tensor) -> Tensor:
            for index in positions:
                x = blocks[index](x, at)
            return x

        for positions, again in plan.groups(len(blocks)):
            x = recomputed(partial(run, positions), x, axis) if again else run(positions, x)
        return x


TOKEN_TABLE = "embedding.tokens.weight"

_VOCABULARY_TABLES = (TOKEN_TABLE, "head.weight")
"""Tensors whose rows are the padded vocabulary; pieces cover the real rows only."""


def _uses(model: Decoder) -> int:
    """Gradients of a tied table in the stage's last backward; past counting where it is lent."""
    return 2 if model.has_head else sys.maxsize


def local_parameters(model: Decoder) -> list[LocalParameter]:
    """Every parameter of the stage with its canonical pieces, in order of definition."""
    setting = model.setting
    found = []
    for name, parameter in model.named_parameters():
        if name == TOKEN_TABLE and model.borrows_table:
            continue
        module, leaf = name.rpartition(".")[::2]
        parts = getattr(model.get_submodule(module), "parts", None)
        if parts is None:
            parts, stem = {module.rpartition(".")[2]: parameter.shape[0]}, module
        else:
            stem = module
        parent = stem.rpartition(".")[0]
        tied = name == TOKEN_TABLE and model.tied
        twin = tied and setting.ctx.tied.size > 1
        found.append(
            LocalParameter(
                parameter=parameter,
                pieces=tuple(
                    _trimmed(piece, setting.vocab_size)
                    for piece in _pieces(parent, parts, leaf, parameter, setting)
                ),
                kind=_kind(name),
                tp_dim=parameter.tp_dim,  # type: ignore[attr-defined]
                partial=parameter.partial,  # type: ignore[attr-defined]
                twin=twin,
                replica=twin and not model.has_embedding,
                uses=_uses(model) if tied and not twin else 1,
            )
        )
    return found


def _pieces(
    parent: str, parts: dict[str, int], leaf: str, parameter: nn.Parameter, setting: Setting
) -> Iterator[Piece]:
    tp, tp_dim = setting.tp, parameter.tp_dim  # type: ignore[attr-defined]
    start = 0
    for part, rows in parts.items():
        local = (rows, *parameter.shape[1:])
        shape = tuple(n * tp.size if dim == tp_dim else n for dim, n in enumerate(local))
        offset = tuple(n * tp.rank if dim == tp_dim else 0 for dim, n in enumerate(local))
        name = ".".join(filter(None, (parent, part, leaf)))
        yield Piece(name, start, start + rows, shape, offset)
        start += rows


def _trimmed(piece: Piece, vocab_size: int) -> Piece:
    """The piece without the padding rows of the vocabulary (possibly no rows at all)."""
    if piece.name not in _VOCABULARY_TABLES:
        return piece
    stop = min(piece.stop, piece.start + max(vocab_size - piece.offset[0], 0))
    offset = (min(piece.offset[0], vocab_size), *piece.offset[1:])
    return Piece(piece.name, piece.start, stop, (vocab_size, *piece.shape[1:]), offset)


def _kind(name: str) -> Kind:
    if "norm." in name:
        return "norm"
    if name.startswith("embedding."):
        return "embedding"
    return "bias" if name.endswith(".bias") else "weight"


@torch.no_grad()
def initialise(model: Decoder) -> None:
    """Fill every parameter from (seed, canonical name, i, j): equal in every layout.

    N(0, std) for matrices, std / sqrt(2 layers) for the projections into the stream (GPT-2), zero for
    biases and for the padding rows of the vocabulary, one for norm weights.
    """
    setting = model.setting
    config = setting.model
    for local in local_parameters(model):
        local.parameter.zero_()
        for piece in local.pieces:
            target = piece.of(local.parameter)
            if local.kind == "norm":
                target.fill_(1.0 if piece.name.endswith(".weight") else 0.0)
            elif local.kind != "bias":
                into_stream = piece.name.endswith(("attention.output.weight", "mlp.down.weight"))
                std = config.init_method_std / (
                    math.sqrt(2 * config.num_layers) if into_stream else 1.0
                )
                drawn = torch.empty_like(target, dtype=torch.float32)
                normal(
                    drawn, key(setting.seed, piece.name),
                    std=std, offset=piece.offset, columns=piece.shape[-1],
                )  # fmt: skip
                target.copy_(drawn)
