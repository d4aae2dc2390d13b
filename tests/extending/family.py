"""A family of Hugging Face, Phi-3, for convert.py and generate.py: its names and its config.json, in and out.

Unlike Llama it keeps q, k, v and gate, up below one another in one matrix each; here without
stretched positions, windows and partial rotation.
"""

from __future__ import annotations

from typing import Any

from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.checkpoint.huggingface.families import FAMILIES
from megatron_lite.checkpoint.huggingface.family import Family
from megatron_lite.checkpoint.huggingface.names import FusedPart, Names
from megatron_lite.config.sections.model import ModelConfig

NAMES = Names(
    prefix="model.",
    outside={"embedding.tokens": "embed_tokens", "final_norm": "norm", "head": "lm_head"},
    layer="layers.{}.",
    block={
        "attention_norm": "input_layernorm",
        "attention.q": FusedPart("self_attn.qkv_proj", 0),
        "attention.k": FusedPart("self_attn.qkv_proj", 1),
        "attention.v": FusedPart("self_attn.qkv_proj", 2),
        "attention.output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": FusedPart("mlp.gate_up_proj", 0),
        "mlp.up": FusedPart("mlp.gate_up_proj", 1),
        "mlp.down": "mlp.down_proj",
    },
)


def config_in(config: ConfigFile) -> ModelConfig:
    """Phi-3 with plain rotary positions."""
    config.must_be({"hidden_act": "silu", "sliding_window": None}, otherwise="is this Phi-3")
    rope = config.below("rope_parameters")
    rope.must_be({"rope_type": "default", "partial_rotary_factor": 1.0}, otherwise="is known here")
    base = rope.number("rope_theta", 10000.0)
    rope.refuse_unknown()
    layers, h, f, heads, positions, rows = map(
        config.size,
        ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
         "max_position_embeddings", "vocab_size"),
    )  # fmt: skip
    groups = config.size("num_key_value_heads", heads)
    epsilon = config.share("rms_norm_eps", 1e-5, above_zero=True)
    dropout, embedding_dropout = (config.share(f"{name}_pdrop", 0.0) for name in ("resid", "embd"))
    attention_dropout = config.share("attention_dropout", 0.0)
    std = config.share("initializer_range", 0.02, above_zero=True)
    tied = config.flag("tie_word_embeddings", default=False)
    if dropout != embedding_dropout:
        config.refuse(f"resid_pdrop {dropout} and embd_pdrop {embedding_dropout} are one rate here")
    config.refuse_unknown(["original_max_position_embeddings"])
    config.require_sound()
    return ModelConfig(
        num_layers=layers,
        hidden_size=h,
        num_attention_heads=heads,
        seq_length=positions,
        max_position_embeddings=positions,
        ffn_hidden_size=f,
        group_query_attention=groups != heads,
        num_query_groups=groups,
        vocab_size=rows,
        position_embedding_type="rope",
        rotary_base=base,
        normalization="RMSNorm",
        norm_epsilon=epsilon,
        swiglu=True,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=not tied,
        hidden_dropout=dropout,
        attention_dropout=attention_dropout,
        init_method_std=std,
    )


def config_out(model: ModelConfig, *, eod: int | None, dtype: str) -> dict[str, Any]:
    """Its config.json."""
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.num_positions,
        "original_max_position_embeddings": model.num_positions,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": model.rotary_base, "partial_rotary_factor": 1.0,
        },
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "pad_token_id": eod,
        "torch_dtype": dtype,
    }  # fmt: skip


PHI3 = Family(
    title="Phi-3",
    architecture="Phi3ForCausalLM",
    names=NAMES,
    config_in=config_in,
    config_out=config_out,
)

FAMILIES["phi3"] = PHI3
