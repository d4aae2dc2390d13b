"""Every parameter of a model by canonical name: shape, tp split, stage, kind.

The one deliberate double entry of the project: the modules in layers/ and models/ define the same
tensors, and a test compares both.  Names know no layout: global layer numbers, q/k/v and gate/up
apart even where they are fused in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_lite.blueprint.stages import Stage
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.model import ModelConfig

Kind = Literal["weight", "bias", "norm", "embedding"]
"""weight and embedding get weight decay, bias and norm do not; norm weights start at one."""


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One tensor of the whole model.

    shape is global; tp_dim is the dim cut over tp, None where every tp rank holds all of it.
    replica: a second copy (tied embedding on the head's stage), not counted in the model's size.
    """

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None
    stage: int
    kind: Kind
    replica: bool = False

    @property
    def size(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    def local_size(self, tp: int) -> int:
        """Elements on one tp rank."""
        return self.size if self.tp_dim is None else self.size // tp


def parameter_table(
    model: ModelConfig, stages: Sequence[Stage], *, padded_vocab_size: int, tp: int = 1
) -> tuple[ParamSpec, ...]:
    """All parameters, stage by stage in the modules' order; ConfigError if tp does not divide."""
    table = tuple(
        spec for stage in stages for spec in _stage_parameters(model, stage, padded_vocab_size)
    )
    _check_divisible(model, tp, padded_vocab_size)
    return table


def total_size(table: Iterable[ParamSpec]) -> int:
    """Parameters of the model, padding included, each counted once."""
    return sum(spec.size for spec in table if not spec.replica)


def rank_size(table: Iterable[ParamSpec], held_stages: Iterable[int], tp: int) -> int:
    """Parameters one rank keeps in memory: its tp share of the stages it holds, replicas included.

    A rank that holds the first and the last stage shares one tied embedding between them.
    """
    held = set(held_stages)
    mine = {spec.name: spec for spec in table if spec.stage in held}
    return sum(spec.local_size(tp) for spec in mine.values())


def _stage_parameters(model: ModelConfig, stage: Stage, padded_vocab: int) -> Iterator[ParamSpec]:
    tied = not model.untie_embeddings_and_output_weights
    vocabulary = (padded_vocab, model.hidden_size)
    if stage.has_embedding:
        yield ParamSpec("embedding.tokens.weight", vocabulary, 0, stage.index, "embedding")
        if model.position_embedding_type == "learned_absolute":
            shape = (model.num_positions, model.hidden_size)
            yield ParamSpec("embedding.positions.weight", shape, None, stage.index, "embedding")
    elif stage.has_head and tied:
        yield ParamSpec(
            "embedding.tokens.weight", vocabulary, 0, stage.index, "embedding", replica=True
        )
    for layer in stage.layers:
        yield from _block(model, f"blocks.{layer}", stage.index)
    if stage.has_head:
        yield from _norm(model, "final_norm", stage.index)
        if not tied:
            yield ParamSpec("head.weight", vocabulary, 0, stage.index, "weight")


def _block(model: ModelConfig, block: str, stage: int) -> Iterator[ParamSpec]:
    h, f = model.hidden_size, model.ffn_size
    queries = model.num_attention_heads * model.head_size
    keys = model.num_kv_heads * model.head_size
    yield from _norm(model, f"{block}.attention_norm", stage)
    for part, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield from _linear(model, f"{block}.attention.{part}", (rows, h), 0, stage)
    yield from _linear(model, f"{block}.attention.output", (h, queries), 1, stage)
    yield from _norm(model, f"{block}.mlp_norm", stage)
    if model.swiglu:
        yield from _linear(model, f"{block}.mlp.gate", (f, h), 0, stage)
    yield from _linear(model, f"{block}.mlp.up", (f, h), 0, stage)
    yield from _linear(model, f"{block}.mlp.down", (h, f), 1, stage)


def _norm(model: ModelConfig, name: str, stage: int) -> Iterator[ParamSpec]:
    yield ParamSpec(f"{name}.weight", (model.hidden_size,), None, stage, "norm")
    if model.normalization == "LayerNorm":
        yield ParamSpec(f"{name}.bias", (model.hidden_size,), None, stage, "norm")


def _linear(
    model: ModelConfig, name: str, shape: tuple[int, int], tp_dim: int, stage: int
) -> Iterator[ParamSpec]:
    yield ParamSpec(f"{name}.weight", shape, tp_dim, stage, "weight")
    if model.add_bias_linear:
        # split outputs have split biases; a row-parallel layer adds the whole bias after its sum
        yield ParamSpec(f"{name}.bias", shape[:1], 0 if tp_dim == 0 else None, stage, "bias")


def _check_divisible(model: ModelConfig, tp: int, padded_vocab_size: int) -> None:
    for flag, size in (
        ("--num-attention-heads", model.num_attention_heads),
        ("--num-query-groups", model.num_kv_heads),
        ("--ffn-hidden-size", model.ffn_size),
        ("padded vocabulary", padded_vocab_size),
    ):
        if size < 1 or size % tp:
            raise ConfigError(
                f"{flag} {size} cannot be split over --tensor-model-parallel-size {tp}; "
                f"choose tp from {[n for n in range(1, tp + 1) if size % n == 0]}"
            )
