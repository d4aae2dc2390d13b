"""Mistral 7B as Hugging Face keeps it: a Llama whose tokens may see a window of the text alone."""

from __future__ import annotations

from typing import Any

from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.checkpoint.huggingface.family import Family
from megatron_lite.checkpoint.huggingface.gated_keys import gated_in, gated_names, gated_out
from megatron_lite.config.sections.model import ModelConfig

_ARCHITECTURE = "MistralForCausalLM"


def _config_in(config: ConfigFile) -> ModelConfig:
    fields = gated_in(config)
    # transformers' own default is a window; a file whose window is null means all of the text
    if config.get("sliding_window", 4096) is not None:
        fields["window_size"] = f"{config.size('sliding_window', 4096) - 1},0"
    config.refuse_unknown()
    config.require_sound()
    return ModelConfig(**fields)


def _config_out(model: ModelConfig, *, eod: int | None, dtype: str) -> dict[str, Any]:
    return gated_out(model, "mistral", _ARCHITECTURE, eod=eod, dtype=dtype) | {
        "sliding_window": model.window
    }


MISTRAL = Family(
    title="Mistral",
    architecture=_ARCHITECTURE,
    names=gated_names(),
    config_in=_config_in,
    config_out=_config_out,
)
