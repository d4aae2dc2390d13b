"""Scaled rotary positions in GGUF's words.

linear, yarn    metadata, from which llama.cpp computes the frequencies anew
llama3          rope_freqs.weight: what llama.cpp's llama divides the frequency of each pair by

ntk has become a base before a model comes here (huggingface/rotary_keys.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lite.blueprint.rotary import frequency_divisors
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.sections.model import ModelConfig

ROPE_FREQS = "rope_freqs.weight"
"""The tensor's name in the file."""


def check_rotary(model: ModelConfig, architecture: str) -> None:
    """CheckpointError where llama.cpp has no words for how positions are scaled."""
    kind, why = model.rope_scaling_type, None
    if kind not in ("none", "linear", "yarn", "llama3"):
        why = "GGUF has none for it"
    elif kind == "llama3" and architecture != "llama":
        why = f"llama.cpp reads its {ROPE_FREQS} in llama alone, not in {architecture}"
    elif kind == "yarn" and not model.rope_whole_channels:
        why = "llama.cpp rounds the channels between which YaRN changes, this model does not"
    elif kind == "yarn" and not _is_derived(model):
        why = (
            "llama.cpp derives the attention factor from the scaling, this model has one of its own"
        )
    if why is not None:
        raise CheckpointError(
            f"--rope-scaling-type {kind} is not written to GGUF: {why} - export to Hugging Face's"
        )


def _is_derived(model: ModelConfig) -> bool:
    own = model.rotary_scale
    return abs(replace(model, rope_attention_factor=None).rotary_scale - own) < 1e-6 * own


def describe_rotary(model: ModelConfig, writer: Any, gguf: Any) -> None:
    """Into a GGUFWriter."""
    writer.add_rope_freq_base(model.rotary_base)
    writer.add_rope_dimension_count(model.rotated_channels)
    if model.rope_scaling_type not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType[model.rope_scaling_type.upper()])
    writer.add_rope_scaling_factor(model.rope_scaling_factor)
    if model.rope_scaling_type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(model.rope_original_length)
        writer.add_rope_scaling_yarn_beta_fast(model.rope_beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(model.rope_beta_slow)


def rope_freqs(model: ModelConfig) -> NDArray[np.float32] | None:
    """fp32 [rotated channels / 2]; None where llama.cpp needs none."""
    if model.rope_scaling_type != "llama3":
        return None
    return np.array(frequency_divisors(model, model.rotated_channels), dtype=np.float32)
