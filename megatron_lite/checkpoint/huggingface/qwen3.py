"""Qwen 3 as Hugging Face keeps it: a Llama with a norm over each head's query and key."""

from __future__ import annotations

from typing import Any

from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.checkpoint.huggingface.family import Family
from megatron_lite.checkpoint.huggingface.gated_keys import (
    BLOCK,
    full_attention,
    gated_in,
    gated_names,
    gated_out,
)
from megatron_lite.config.sections.model import ModelConfig

_ARCHITECTURE = "Qwen3ForCausalLM"
_BLOCK = {
    **BLOCK,
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
}


def _config_in(config: ConfigFile) -> ModelConfig:
    config.must_be({"attention_bias": False}, otherwise="is a Qwen3 here")
    fields = gated_in(config) | {"qk_layernorm": True}
    full_attention(config, fields["num_layers"])
    config.refuse_unknown()
    config.require_sound()
    return ModelConfig(**fields)


def _config_out(model: ModelConfig, *, eod: int | None, dtype: str) -> dict[str, Any]:
    return gated_out(model, "qwen3", _ARCHITECTURE, eod=eod, dtype=dtype) | {
        "attention_bias": False,
        "use_sliding_window": False,
    }


QWEN3 = Family(
    title="Qwen3",
    architecture=_ARCHITECTURE,
    names=gated_names(_BLOCK),
    config_in=_config_in,
    config_out=_config_out,
)
