"""Rotary positions in config.json: rope_parameters of today, rope_theta and rope_scaling of before."""

from __future__ import annotations

from typing import Any

from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.config.sections.model import SCALING, ModelConfig

_SHARE = "partial_rotary_factor"


def rotary_in(
    config: ConfigFile, *, base: str = "rope_theta", share: str | None = None, default: float = 1.0
) -> dict[str, Any]:
    """Fields of ModelConfig; puts down what of it is not known here.

    base, share: keys of before for the base and, where a family turns some channels alone, for
    their share; default: the share where none is said.
    """
    before = config.number(base, 10000.0)
    turned = default if share is None else _share(config, share, default)
    today, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if today and scaling and not _says(today, scaling):
        config.refuse(f"rope_parameters {today} and rope_scaling {scaling} say different things")
    rope = config.below("rope_parameters" if today else "rope_scaling")
    found = rope.number("rope_theta", before)
    scaled = _scaling_in(rope, config.size("max_position_embeddings", 1))
    if share is not None:
        turned = _share(rope, _SHARE, turned)
    rope.refuse_unknown()
    return {
        "position_embedding_type": "rope", "rotary_base": found, "rotary_percent": turned,
        **scaled,
    }  # fmt: skip


_KEYS = {
    "rope_scaling_factor": "factor",
    "rope_original_length": "original_max_position_embeddings",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
}
"""Our field -> its key, which types that have the field must say."""


def _scaling_in(rope: ConfigFile, longest: int) -> dict[str, Any]:
    """Fields of --rope-scaling-type; longest: positions of the model, trained ones where none are said."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope.get("type")
    if kind == "default":
        return {}
    if not isinstance(kind, str) or kind not in _TYPES:
        known = ", ".join(("default", *_TYPES))
        rope.refuse(f"{rope.inside}rope_type {kind!r}: only {known} are known here")
        return {}
    found: dict[str, Any] = {"rope_scaling_type": kind}
    for field, kinds in SCALING.items():
        if kind not in kinds:
            continue
        key = _KEYS[field]
        if field == "rope_original_length":
            found[field] = rope.size(key, longest)
        elif rope.get(key) is None:
            rope.refuse(f"{rope.inside}{key} is missing, which rope_type {kind!r} needs")
        else:
            found[field] = rope.number(key, 1.0)
    if found.get("rope_scaling_factor", 1.0) < 1:
        rope.refuse(f"{rope.inside}factor {rope.get('factor')!r}: less than 1 shortens")
    if found.get("rope_low_freq_factor", 0.0) >= found.get("rope_high_freq_factor", 1.0):
        rope.refuse(f"{rope.inside}low_freq_factor must be below high_freq_factor")
    return found


_TYPES = ("linear", "llama3")
"""Values of rope_type that we compute; ours are called the same."""


def _share(config: ConfigFile, key: str, default: float) -> float:
    """A share of the channels, all of them too."""
    share = config.number(key, default)
    if share > 1:
        config.refuse(f"{config.inside}{key} {share!r}: more than all channels of a head")
    return min(share, 1.0)


def _says(today: Any, scaling: Any) -> bool:
    """Whether the keys of before repeat those of today; type was rope_type's name once."""
    if not isinstance(today, dict) or not isinstance(scaling, dict):
        return False
    repeated = {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
    return all(today.get(key) == value for key, value in repeated.items())


def rotary_out(
    model: ModelConfig, *, base: str = "rope_theta", share: str | None = None
) -> dict[str, Any]:
    """The same as keys, in both ways: readers that know one of them alone find the right base."""
    today: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    before: dict[str, Any] = {base: model.rotary_base}
    kind = model.rope_scaling_type
    if kind in _TYPES:
        scaled = {_KEYS[name]: getattr(model, name) for name, of in SCALING.items() if kind in of}
        before["rope_scaling"] = {"rope_type": kind, **scaled}
        today.update(before["rope_scaling"])
    if share is not None:
        today[_SHARE] = before[share] = model.rotary_percent
    return {"rope_parameters": today, **before}
