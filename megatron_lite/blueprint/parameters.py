"""Every parameter of a model by canonical name: shape, tp split, stage, kind.

A fold over the model's figure, as the modules of layers/ are.  Names know no layout: global layer
numbers, q/k/v and gate/up apart even where they are fused in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_lite.blueprint.figure.heads import VOCABULARY
from megatron_lite.blueprint.figure.parts import Figure, Tensor
from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.blueprint.stages import StageLayers
from megatron_lite.config.sections.model import ModelConfig


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """A tensor of the whole model and the stage that holds it; shapes are global.

    replica: another copy (tied embedding on the head's stage, what all stages share), not counted in the
    model's size.
    """

    tensor: Tensor
    stage: int
    replica: bool = False

    @property
    def name(self) -> str:
        """Canonical."""
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.tensor.shape

    @property
    def tp_dim(self) -> int | None:
        """The dim cut over tp, None where every tp rank holds all of it."""
        return self.tensor.tp_dim

    @property
    def size(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    def local_size(self, tp: int) -> int:
        """Elements on one tp rank."""
        return math.prod(self.tensor.local(tp))


def parameter_table(
    model: ModelConfig,
    stages: Sequence[StageLayers],
    *,
    padded_vocab_size: int,
    head: str = VOCABULARY,
) -> tuple[ParamSpec, ...]:
    """All parameters, stage by stage in the modules' order; head: a row of HEADS."""
    return table_of(figure_of(model, padded_vocab_size, head), tuple(stages))


@lru_cache(maxsize=32)  # a search asks for the same table once per micro batch size
def table_of(figure: Figure, stages: tuple[StageLayers, ...]) -> tuple[ParamSpec, ...]:
    """The same of any figure."""
    return tuple(spec for stage in stages for spec in _stage_parameters(figure, stage))


def total_size(table: Iterable[ParamSpec]) -> int:
    """Parameters of the model, padding included, each counted once."""
    return sum(spec.size for spec in table if not spec.replica)


def stage_tensors(figure: Figure, stage: StageLayers) -> Iterator[Tensor]:
    """The canonical tensors that a stage holds, in the modules' order."""
    yield from figure.shared.tensors()
    if stage.has_embedding:
        yield from figure.embedding.tensors()
    elif stage.has_head and figure.tied:
        yield from figure.tokens.tensors()
    for layer in stage.layers:
        for tensor in figure.layers[layer].tensors():
            yield tensor.below(f"blocks.{layer}.")
    if stage.has_head:
        yield from figure.head.tensors()


def _stage_parameters(figure: Figure, stage: StageLayers) -> Iterator[ParamSpec]:
    lent = stage.has_head and figure.tied and not stage.has_embedding
    table = {tensor.name for tensor in figure.tokens.tensors()} if lent else set()
    for tensor in stage_tensors(figure, stage):
        copied = tensor.name in table or (tensor.stages and not stage.has_embedding)
        yield ParamSpec(tensor, stage.index, replica=copied)
