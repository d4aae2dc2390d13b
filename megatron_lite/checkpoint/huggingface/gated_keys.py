"""What Llama and its relatives share: modules by name, and most keys of config.json.

RMSNorm before each part, rotary positions, grouped queries, a gated feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.checkpoint.huggingface.names import Names
from megatron_lite.checkpoint.huggingface.rotary_keys import rotary_in, rotary_out
from megatron_lite.config.sections.model import ModelConfig

BLOCK: Mapping[str, str] = MappingProxyType({
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
})  # fmt: skip
"""The modules of a layer."""


def gated_names(block: Mapping[str, str] = BLOCK) -> Names:
    """The names of a family, with the modules of its layers."""
    return Names(
        prefix="model.",
        outside={"embedding.tokens": "embed_tokens", "final_norm": "norm", "head": "lm_head"},
        layer="layers.{}.",
        block=block,
        constants=(".rotary_emb.inv_freq",),
    )


def gated_in(config: ConfigFile, *, epsilon: float = 1e-6) -> dict[str, Any]:
    """Fields of ModelConfig from the shared keys; epsilon: rms_norm_eps where none is said."""
    config.must_be({"hidden_act": "silu"}, otherwise=f"is a {config.title}")
    layers, h, f, heads, positions, rows = map(
        config.size,
        ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
         "max_position_embeddings", "vocab_size"),
    )  # fmt: skip
    said = {"num_key_value_heads": heads, "head_dim": max(h // heads, 1)}
    groups, head_size = (
        value if config.get(key) is None else config.size(key) for key, value in said.items()
    )
    return {
        "num_layers": layers,
        "hidden_size": h,
        "num_attention_heads": heads,
        "seq_length": positions,
        "max_position_embeddings": positions,
        "ffn_hidden_size": f,
        "kv_channels": head_size,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "vocab_size": rows,
        "normalization": "RMSNorm",
        "norm_epsilon": config.share("rms_norm_eps", epsilon, above_zero=True),
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not config.flag(
            "tie_word_embeddings", default=False
        ),
        "hidden_dropout": 0.0,
        "attention_dropout": config.share("attention_dropout", 0.0),
        "init_method_std": config.share("initializer_range", 0.02, above_zero=True),
        **rotary_in(config),
    }


def full_attention(config: ConfigFile, layers: int) -> None:
    """Qwen's keys of windows in some layers: every layer must see the whole text."""
    if config.flag("use_sliding_window", default=False):
        config.refuse("use_sliding_window True: only some layers have the window, here all or none")
    for key in ("sliding_window", "max_window_layers"):  # without the other they have no say
        config.get(key)
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * layers:
        config.refuse(
            f"layer_types: only 'full_attention' of all {layers} layers is a {config.title}"
        )


def gated_out(
    model: ModelConfig, kind: str, architecture: str, *, eod: int | None, dtype: str
) -> dict[str, Any]:
    """The shared keys; kind: its model_type."""
    return {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.num_positions,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        **rotary_out(model),
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": None,
        "eos_token_id": eod,
        "use_cache": True,
        "dtype": dtype,
    }
