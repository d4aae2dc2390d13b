"""Llama, 1 to 3.2, as Hugging Face keeps it: no biases, or with attention_bias and mlp_bias all of them."""

from __future__ import annotations

from typing import Any

from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.checkpoint.huggingface.family import Family
from megatron_lite.checkpoint.huggingface.gated_keys import gated_in, gated_names, gated_out
from megatron_lite.config.sections.model import ModelConfig

_ARCHITECTURE = "LlamaForCausalLM"


def _config_in(config: ConfigFile) -> ModelConfig:
    biases = [config.flag(key, default=False) for key in ("attention_bias", "mlp_bias")]
    if len(set(biases)) > 1:
        config.refuse(f"attention_bias {biases[0]} and mlp_bias {biases[1]}: biases are in all "
                      "linear layers here, or in none")  # fmt: skip
    fields = gated_in(config) | {"add_bias_linear": biases[0]}
    config.refuse_unknown(["pretraining_tp"])  # how products are cut, not what they are
    config.require_sound()
    return ModelConfig(**fields)


def _config_out(model: ModelConfig, *, eod: int | None, dtype: str) -> dict[str, Any]:
    biases = dict.fromkeys(("attention_bias", "mlp_bias"), model.add_bias_linear)
    return gated_out(model, "llama", _ARCHITECTURE, eod=eod, dtype=dtype) | biases


LLAMA = Family(
    title="Llama",
    architecture=_ARCHITECTURE,
    names=gated_names(),
    config_in=_config_in,
    config_out=_config_out,
)
