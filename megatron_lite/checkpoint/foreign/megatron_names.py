"""Our canonical tensors by the names of Megatron's modules; q, k and v of one key head lie together."""

from __future__ import annotations

from megatron_lite.blueprint.figure.parts import Activation
from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.checkpoint.huggingface.names import FusedPart, Names
from megatron_lite.config.sections.model import ModelConfig


def is_gated(model: ModelConfig) -> bool:
    """Whether the feed-forward layer's first matrix holds a gate above what it gates."""
    layer = figure_of(model, model.vocab_size or 1).layers[0]
    return any(activation.gated for activation in layer.of(Activation))


def megatron_names(model: ModelConfig) -> Names:
    """Megatron core's names, of a whole model whose layers are numbered."""
    up: dict[str, str | FusedPart] = {"mlp.up": "mlp.linear_fc1"}
    if is_gated(model):
        up = {"mlp.gate": FusedPart("mlp.linear_fc1", 0), "mlp.up": FusedPart("mlp.linear_fc1", 1)}
    parts = ("attention.q", "attention.k", "attention.v")
    return Names(
        prefix="",
        outside={
            "embedding.tokens": "embedding.word_embeddings",
            "embedding.positions": "embedding.position_embeddings",
            "final_norm": "decoder.final_layernorm",
            "head": "output_layer",
        },
        layer="decoder.layers.{}.",
        block={
            "attention_norm": "input_layernorm",
            **{
                part: FusedPart("self_attention.linear_qkv", number, by_head=True)
                for number, part in enumerate(parts)
            },
            "attention.q_norm": "self_attention.q_layernorm",
            "attention.k_norm": "self_attention.k_layernorm",
            "attention.output": "self_attention.linear_proj",
            "mlp_norm": "pre_mlp_layernorm",
            **up,
            "mlp.down": "mlp.linear_fc2",
        },
    )
