"""Qwen 2 and 2.5 as Hugging Face keeps them: a Llama with biases of queries, keys and values."""

from __future__ import annotations

from typing import Any

from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.checkpoint.huggingface.family import Family
from megatron_lite.checkpoint.huggingface.gated_keys import (
    full_attention,
    gated_in,
    gated_names,
    gated_out,
)
from megatron_lite.config.sections.model import ModelConfig

_ARCHITECTURE = "Qwen2ForCausalLM"


def _config_in(config: ConfigFile) -> ModelConfig:
    fields = gated_in(config) | {"add_qkv_bias": True}
    full_attention(config, fields["num_layers"])
    config.refuse_unknown()
    config.require_sound()
    return ModelConfig(**fields)


def _config_out(model: ModelConfig, *, eod: int | None, dtype: str) -> dict[str, Any]:
    return gated_out(model, "qwen2", _ARCHITECTURE, eod=eod, dtype=dtype) | {
        "use_sliding_window": False
    }


QWEN2 = Family(
    title="Qwen2",
    architecture=_ARCHITECTURE,
    names=gated_names(),
    config_in=_config_in,
    config_out=_config_out,
)
