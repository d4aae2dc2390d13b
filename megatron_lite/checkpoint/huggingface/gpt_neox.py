"""GPT-NeoX (Pythia) as Hugging Face keeps it: two parts side by side, some channels turned, q, k, v by head."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Literal

from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.checkpoint.huggingface.family import Family
from megatron_lite.checkpoint.huggingface.names import FusedPart, Names
from megatron_lite.checkpoint.huggingface.rotary_keys import rotary_in, rotary_out
from megatron_lite.config.sections.model import ModelConfig

_QKV = "attention.query_key_value"
_NAMES = Names(
    prefix="gpt_neox.",
    outside={"embedding.tokens": "embed_in", "final_norm": "final_layer_norm", "head": "embed_out"},
    layer="layers.{}.",
    block={
        "attention_norm": "input_layernorm",
        "attention.q": FusedPart(_QKV, 0, by_head=True),
        "attention.k": FusedPart(_QKV, 1, by_head=True),
        "attention.v": FusedPart(_QKV, 2, by_head=True),
        "attention.output": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
    constants=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)
_GELU: MappingProxyType[str, Literal["tanh", "erf"]] = MappingProxyType(
    {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
)


def _config_in(config: ConfigFile) -> ModelConfig:
    config.must_be({"attention_bias": True}, otherwise="is a GPT-NeoX here")
    layers, h, f, heads, positions, rows = map(
        config.size,
        ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
         "max_position_embeddings", "vocab_size"),
    )  # fmt: skip
    model = ModelConfig(
        num_layers=layers,
        hidden_size=h,
        num_attention_heads=heads,
        seq_length=positions,
        max_position_embeddings=positions,
        ffn_hidden_size=f,
        vocab_size=rows,
        gelu=config.choice("hidden_act", _GELU, "gelu"),
        norm_epsilon=config.share("layer_norm_eps", 1e-5, above_zero=True),
        hidden_dropout=config.share("hidden_dropout", 0.0),
        attention_dropout=config.share("attention_dropout", 0.0),
        init_method_std=config.share("initializer_range", 0.02, above_zero=True),
        parallel_residual=config.flag("use_parallel_residual", default=True),
        untie_embeddings_and_output_weights=not config.flag("tie_word_embeddings", default=False),
        **rotary_in(config, base="rotary_emb_base", share="rotary_pct", default=0.25),
    )
    config.refuse_unknown(["classifier_dropout"])
    config.require_sound()
    return model


def _config_out(model: ModelConfig, *, eod: int | None, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.num_positions,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "hidden_act": next(name for name, form in _GELU.items() if form == model.gelu),
        "layer_norm_eps": model.norm_epsilon,
        **rotary_out(model, base="rotary_emb_base", share="rotary_pct"),
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": True,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "use_cache": True,
        "dtype": dtype,
    }


GPT_NEOX = Family(
    title="GPT-NeoX",
    architecture="GPTNeoXForCausalLM",
    names=_NAMES,
    config_in=_config_in,
    config_out=_config_out,
    default_ends={2: "GPTNeoXConfig"},
)
