"""Rotary positions in config.json: rope_parameters of today, rope_theta and rope_scaling of before."""

from __future__ import annotations

from typing import Any

from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.config.sections.model import ModelConfig

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
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        rope.refuse(f"{rope.inside}rope_type {kind!r}: only 'default' is known here")
    found = rope.number("rope_theta", before)
    if share is not None:
        turned = _share(rope, _SHARE, turned)
    rope.refuse_unknown()
    return {
        "position_embedding_type": "rope", "rotary_base": found, "rotary_percent": turned,
    }  # fmt: skip


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
    before = {base: model.rotary_base}
    if share is not None:
        today[_SHARE] = before[share] = model.rotary_percent
    return {"rope_parameters": today, **before}
