"""A family of Hugging Face, Llama, for convert.py and generate.py: its names and its config.json, in and out.

All is unlike GPT-2: q, k, v and gate, up lie apart and are not transposed, queries share keys, there
is no bias, and config.json has keys of its own.
"""

from __future__ import annotations

from typing import Any

from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.checkpoint.huggingface.families import FAMILIES
from megatron_lite.checkpoint.huggingface.family import Family
from megatron_lite.checkpoint.huggingface.names import Names
from megatron_lite.config.sections.model import ModelConfig

NAMES = Names(
    prefix="model.",
    outside={"embedding.tokens": "embed_tokens", "final_norm": "norm", "head": "lm_head"},
    layer="layers.{}.",
    block={
        "attention_norm": "input_layernorm",
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    },
    constants=(".rotary_emb.inv_freq",),
)


def config_in(config: ConfigFile) -> ModelConfig:
    """Llama without biases and without stretched positions."""
    needed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    config.must_be(needed, otherwise="is this Llama")
    rope = config.below("rope_parameters")
    rope.must_be({"rope_type": "default"}, otherwise="is known here")
    base = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    rope.refuse_unknown()
    layers, h, f, heads, positions, rows = map(
        config.size,
        ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
         "max_position_embeddings", "vocab_size"),
    )  # fmt: skip
    groups = config.size("num_key_value_heads", heads)
    head_size = config.size("head_dim", max(h // heads, 1))
    epsilon = config.share("rms_norm_eps", 1e-6, above_zero=True)
    dropout = config.share("attention_dropout", 0.0)
    std = config.share("initializer_range", 0.02, above_zero=True)
    tied = config.flag("tie_word_embeddings", default=False)
    config.refuse_unknown(["pretraining_tp"])
    config.require_sound()
    return ModelConfig(
        num_layers=layers,
        hidden_size=h,
        num_attention_heads=heads,
        seq_length=positions,
        max_position_embeddings=positions,
        ffn_hidden_size=f,
        kv_channels=head_size,
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
        hidden_dropout=0.0,
        attention_dropout=dropout,
        init_method_std=std,
    )


def config_out(model: ModelConfig, *, eod: int | None, dtype: str) -> dict[str, Any]:
    """Its config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "torch_dtype": dtype,
    }


LLAMA = Family(
    title="Llama",
    architecture="LlamaForCausalLM",
    names=NAMES,
    config_in=config_in,
    config_out=config_out,
)

FAMILIES["llama"] = LLAMA
