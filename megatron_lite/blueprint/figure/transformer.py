"""ModelConfig -> Figure: the pre-norm transformer of GPT and Llama."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from megatron_lite.blueprint.figure.heads import HEADS, VOCABULARY
from megatron_lite.blueprint.figure.parts import (
    FINAL_NORM,
    K_NORM,
    POSITIONS,
    Q_NORM,
    SLOWING,
    TOKENS,
    Activation,
    Core,
    Figure,
    Matrix,
    Norm,
    Parts,
    Slowing,
    Table,
)
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.model import ModelConfig


@lru_cache(maxsize=64)  # a search asks for the same model thousands of times
def figure_of(model: ModelConfig, padded_vocab_size: int, head: str = VOCABULARY) -> Figure:
    """The model's parts with a vocabulary of so many rows, padding included; head: a row of HEADS."""
    h = model.hidden_size
    embedding: list[Table] = [Table(TOKENS, padded_vocab_size, h, vocabulary=True)]
    if model.position_embedding_type == "learned_absolute":
        embedding.append(Table(POSITIONS, model.num_positions, h, vocabulary=False))
    if head not in HEADS:
        raise ConfigError(
            f"the head {head!r} of --objective is no row of HEADS (it has {', '.join(HEADS)}) - add one "
            "where the objective is added"
        )
    output = HEADS[head](model, padded_vocab_size)
    end = (_norm(model, FINAL_NORM), *(() if output is None else (output,)))
    return Figure(
        embedding=Parts(tuple(embedding)),
        layers=(_layer(model),) * model.num_layers,
        head=Parts(end),
        tied=output is None,
        shared=Parts(tuple(_shared(model))),
    )


def _shared(model: ModelConfig) -> Iterator[Slowing]:
    if model.position_embedding_type == "rope" and model.rope_scaling_type == "clex":
        channels = model.rotated_channels
        yield Slowing(SLOWING, channels // 2, model.rope_clex_width * channels)


def _norm(model: ModelConfig, name: str, *, heads: int = 0) -> Norm:
    layer, width = (
        model.normalization == "LayerNorm",
        model.head_size if heads else model.hidden_size,
    )
    return Norm(
        name, width, model.normalization,
        bias=layer and model.layernorm_bias, less_one=model.apply_layernorm_1p, heads=heads,
    )  # fmt: skip


def _head_norms(model: ModelConfig) -> tuple[Norm, ...]:
    """Those of queries and keys, where they are normalised."""
    if not model.qk_layernorm:
        return ()
    heads = {Q_NORM: model.num_attention_heads, K_NORM: model.num_kv_heads}
    return tuple(_norm(model, name, heads=count) for name, count in heads.items())


def _function(model: ModelConfig) -> Literal["gelu", "gelu_erf", "swiglu"]:
    if model.swiglu:
        return "swiglu"
    return "gelu" if model.gelu == "tanh" else "gelu_erf"


def _layer(model: ModelConfig) -> Parts:
    h, f, bias = model.hidden_size, model.ffn_size, model.add_bias_linear
    core = Core(
        "attention.core", model.num_attention_heads, model.num_kv_heads, model.head_size,
        rotated=model.rotated_channels, interleaved=model.rotary_interleaved, window=model.window,
        group=model.group_size,
    )  # fmt: skip
    qkv = (
        ("attention.q", core.queries),
        ("attention.k", core.keys),
        ("attention.v", core.keys),
    )
    up = (("mlp.gate", f), ("mlp.up", f)) if model.swiglu else (("mlp.up", f),)
    output, down = (("attention.output", h),), (("mlp.down", h),)
    return Parts((
        _norm(model, "attention_norm"),
        Matrix("attention.qkv", qkv, h, "rows", bias or model.add_qkv_bias),
        *_head_norms(model),
        core,
        Matrix("attention.output", output, core.queries, "columns", bias, into_stream=True),
        replace(_norm(model, "mlp_norm"), beside=model.parallel_residual),
        Matrix("mlp.up", up, h, "rows", bias),
        Activation("mlp.activation", f, _function(model)),
        Matrix("mlp.down", down, f, "columns", bias, into_stream=True),
    ))  # fmt: skip
