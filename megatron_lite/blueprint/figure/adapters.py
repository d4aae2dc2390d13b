"""A Figure -> the same with every part frozen, and adapters beside the matrices that --lora-targets names."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from megatron_lite.blueprint.figure.parts import (
    Activation,
    Core,
    Figure,
    LowRank,
    Matrix,
    Part,
    Parts,
    Slowing,
    Table,
    WeightFormat,
)
from megatron_lite.config.lora_targets import target_modules
from megatron_lite.config.sections.lora import LoraConfig
from megatron_lite.config.sections.model import ModelConfig


def with_adapters(figure: Figure, lora: LoraConfig, model: ModelConfig) -> Figure:
    """What is built and trained: the figure itself where no adapter is asked for."""
    if lora.lora_rank is None:
        return figure
    targets = target_modules(lora.lora_targets, model)
    return _adapted(
        figure, targets, lora.lora_rank, lora.scale, lora.lora_dropout, lora.lora_variant == "dora",
        "nf4" if lora.packs else None,
    )  # fmt: skip


@lru_cache(maxsize=8)  # layers that are alike stay one object, and a figure is compared by them
def _adapted(
    figure: Figure,
    targets: frozenset[str],
    rank: int,
    scale: float,
    dropout: float,
    magnitude: bool,
    storage: WeightFormat | None,
) -> Figure:
    def beside(part: Matrix | Table) -> LowRank | None:
        name = f"{part.name}.adapter"
        if isinstance(part, Table):
            of_table = LowRank(name, ((part.name, part.columns),), part.rows, None, rank, scale)
            return of_table if part.name in targets else None
        pieces = tuple(piece for piece in part.pieces if piece[0] in targets)
        found = LowRank(name, pieces, part.columns, part.cut, rank, scale, dropout, magnitude)
        return found if pieces else None

    def frozen(part: Part) -> Part:
        if isinstance(part, Core | Activation | Slowing):
            return part
        if isinstance(part, Matrix):
            kept = storage or part.storage
            return replace(part, frozen=True, adapter=beside(part), storage=kept)
        if isinstance(part, Table):
            return replace(part, frozen=True, adapter=beside(part))
        return replace(part, frozen=True)

    def of(parts: Parts) -> Parts:
        return Parts(tuple(map(frozen, parts.parts)))

    made = {id(layer): of(layer) for layer in figure.layers}
    return replace(
        figure,
        embedding=of(figure.embedding),
        layers=tuple(made[id(layer)] for layer in figure.layers),
        head=of(figure.head),
    )
