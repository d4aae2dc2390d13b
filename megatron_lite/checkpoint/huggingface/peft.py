"""Folders of PEFT's: adapter_config.json and adapter_model.safetensors, in and out.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight     [r, in]
                                                     lora_B.weight     [out, r]
                                                     lora_magnitude_vector   [out], of DoRA
    base_model.model.model.embed_tokens.lora_embedding_A [r, v], lora_embedding_B [h, r]

A module that a family fuses (GPT-2's c_attn) has one A and B there and one for each piece here: ours
go out side by side, with a rank so many times as large; others' come in as pieces that share an A.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_lite.blueprint.figure.parts import LORA_A, LORA_B, MAGNITUDE, TOKENS
from megatron_lite.checkpoint.huggingface.conversion import Conversion, conversions
from megatron_lite.checkpoint.huggingface.families import family_for
from megatron_lite.config.lora_targets import TARGETS
from megatron_lite.config.sections.model import ModelConfig

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ENDS = {
    "lora_A.weight": LORA_A, "lora_B.weight": LORA_B, "lora_magnitude_vector": MAGNITUDE,
    "lora_embedding_A": LORA_A, "lora_embedding_B": LORA_B,
}  # fmt: skip


def adapted_modules(model: ModelConfig) -> dict[str, Conversion]:
    """Hugging Face's name of every matrix and of the token table -> the canonical tensors in it."""
    names = family_for(model, None, "the model").names
    adapted = {module for modules in TARGETS.values() for module in modules}
    found = {}
    for one in conversions(names, model):
        modules = {re.sub(r"^blocks\.\d+\.", "", name).removesuffix(".weight") for name in one.ours}
        if modules <= adapted and one.theirs.endswith(".weight"):
            found[one.theirs.removesuffix(".weight")] = one
    return found


def is_peft(path: Path) -> bool:
    """Whether a folder holds adapters of PEFT's."""
    return (path / ADAPTER_CONFIG).is_file()


def holds_table(conversion: Conversion) -> bool:
    """Whether it is the token table."""
    return f"{TOKENS}.weight" in conversion.ours
