"""FAMILIES: the model_type of config.json -> how such a folder is read and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.huggingface.family import Family
from megatron_lite.checkpoint.huggingface.gpt2 import GPT2
from megatron_lite.checkpoint.huggingface.gpt_neox import GPT_NEOX
from megatron_lite.checkpoint.huggingface.llama import LLAMA
from megatron_lite.checkpoint.huggingface.mistral import MISTRAL
from megatron_lite.checkpoint.huggingface.qwen2 import QWEN2
from megatron_lite.checkpoint.huggingface.qwen3 import QWEN3
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.sections.model import ModelConfig

FAMILIES: dict[str, Family] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gpt_neox": GPT_NEOX,
}
"""In the order in which an export tries them; no other file names a family."""


def family_of(config: Mapping[str, Any], path: Path) -> Family:
    """The family of a config.json; CheckpointError lists the known ones."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{path} is of the model_type {kind!r}; those that can be read are {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def family_for(model: ModelConfig, asked: str | None, where: str) -> Family:
    """The family asked for, or the first that can say all of a model.

    Raises CheckpointError naming the flags of what each has no words for.
    """
    tried = FAMILIES if asked is None else {asked: FAMILIES[asked]}
    reasons = []
    for family in tried.values():
        lacks = family.lacks(model)
        if not lacks:
            return family
        reasons.append(f"Hugging Face's {family.title} has no {', '.join(lacks)}")
    raise CheckpointError(f"{where}: {'; '.join(reasons)} - this model cannot be written as one")
