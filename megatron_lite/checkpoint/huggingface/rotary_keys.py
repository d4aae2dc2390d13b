"""Rotary positions in config.json: rope_parameters of today, rope_theta and rope_scaling of before."""

from __future__ import annotations

from typing import Any

from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.config.sections.model import ModelConfig


def rotary_in(config: ConfigFile) -> dict[str, Any]:
    """Fields of ModelConfig; puts down what of it is not known here."""
    before = config.number("rope_theta", 10000.0)
    today, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if today and scaling and not _says(today, scaling):
        config.refuse(f"rope_parameters {today} and rope_scaling {scaling} say different things")
    rope = config.below("rope_parameters" if today else "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        rope.refuse(f"{rope.inside}rope_type {kind!r}: only 'default' is known here")
    base = rope.number("rope_theta", before)
    rope.refuse_unknown()
    return {"position_embedding_type": "rope", "rotary_base": base}


def _says(today: Any, scaling: Any) -> bool:
    """Whether the keys of before repeat those of today; type was rope_type's name once."""
    if not isinstance(today, dict) or not isinstance(scaling, dict):
        return False
    repeated = {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
    return all(today.get(key) == value for key, value in repeated.items())


def rotary_out(model: ModelConfig) -> dict[str, Any]:
    """The same as keys, in both ways: readers that know one of them alone find the right base."""
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "rope_theta": model.rotary_base,
    }
