"""Rotary positions in config.json: rope_parameters of today, rope_theta and rope_scaling of before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from megatron_lite.blueprint.rotary import scaled_base
from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.config.sections.model import SCALING, ModelConfig, listed_numbers, yarn_scale

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
    if today and scaling and not _says(today, scaling, before):
        config.refuse(
            f"rope_parameters {today} and rope_scaling {scaling} with {base} {before} say different things"
        )
    rope = config.below("rope_parameters" if today else "rope_scaling")
    found = rope.number("rope_theta", before)
    scaled = _scaling_in(config, rope)
    if share is not None:
        turned = _share(rope, _SHARE, turned)
    rope.refuse_unknown(["finetuned"])  # the first YaRN models say so
    return {
        "position_embedding_type": "rope", "rotary_base": found, "rotary_percent": turned,
        **scaled,
    }  # fmt: skip


_KEYS = {
    "rope_scaling_factor": "factor",
    "rope_original_length": "original_max_position_embeddings",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
    "rope_whole_channels": "truncate",
    "rope_attention_factor": "attention_factor",
    "rope_short_factors": "short_factor",
    "rope_long_factors": "long_factor",
}
"""Our field -> its key."""

_TYPES = ("linear", "dynamic", "yarn", "llama3", "longrope")
"""Values of rope_type that we compute; ours are called the same."""


def _scaling_in(config: ConfigFile, rope: ConfigFile) -> dict[str, Any]:
    """Fields of --rope-scaling-type, from rope_parameters and from beside them."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope.get("type")
    if kind == "default":
        return {}
    if not isinstance(kind, str) or kind not in _TYPES:
        known = ", ".join(("default", *_TYPES))
        rope.refuse(f"{rope.inside}rope_type {kind!r}: only {known} are known here")
        return {}
    longest = config.size("max_position_embeddings", 1)
    found: dict[str, Any] = {"rope_scaling_type": kind}
    if kind == "dynamic":  # transformers has no other key for it
        found["rope_original_length"] = longest
    elif kind != "linear":
        own = config.get("original_max_position_embeddings")  # this one wins in transformers, too
        source = rope if own is None else config
        rope.get("original_max_position_embeddings")
        found["rope_original_length"] = source.size("original_max_position_embeddings", longest)
    stretch = longest / found.get("rope_original_length", longest)
    optional = {"factor": max(stretch, 1.0)} if kind in ("yarn", "longrope") else {}
    found["rope_scaling_factor"] = _needed(rope, "factor", kind, optional)
    if found["rope_scaling_factor"] < 1:
        rope.refuse(f"{rope.inside}factor {rope.get('factor')!r}: less than 1 shortens")
    if kind == "llama3":
        found["rope_low_freq_factor"] = _needed(rope, "low_freq_factor", kind)
        found["rope_high_freq_factor"] = _needed(rope, "high_freq_factor", kind)
    if kind == "yarn":
        found |= _yarn_in(rope, found["rope_scaling_factor"])
    if kind == "longrope":
        found |= {
            name: _list(rope, _KEYS[name]) for name in ("rope_short_factors", "rope_long_factors")
        }
        found["rope_attention_factor"] = _if_said(rope, "attention_factor")
    return found


def _yarn_in(rope: ConfigFile, factor: float) -> dict[str, Any]:
    """What only YaRN has; DeepSeek's mscale and mscale_all_dim are another way to say attention_factor."""
    attention = _if_said(rope, "attention_factor")
    above, below = (
        None if rope.get(key) == 0 else _if_said(rope, key) for key in ("mscale", "mscale_all_dim")
    )  # 0 says nothing
    if attention is None and above is not None and below is not None:
        attention = yarn_scale(factor, above) / yarn_scale(factor, below)
    return {
        "rope_beta_fast": _if_said(rope, "beta_fast") or 32.0,
        "rope_beta_slow": _if_said(rope, "beta_slow") or 1.0,
        "rope_whole_channels": rope.flag("truncate", default=True),
        "rope_attention_factor": attention,
    }  # fmt: skip


def _needed(
    rope: ConfigFile, key: str, kind: str, otherwise: Mapping[str, float] = MappingProxyType({})
) -> float:
    """A number that a type needs, unless something else follows where it is not said."""
    if rope.get(key) is None and key not in otherwise:
        rope.refuse(f"{rope.inside}{key} is missing, which rope_type {kind!r} needs")
        return 1.0
    return rope.number(key, 1.0) if rope.get(key) is not None else otherwise[key]


def _if_said(rope: ConfigFile, key: str) -> float | None:
    return None if rope.get(key) is None else rope.number(key, 1.0)


def _list(rope: ConfigFile, key: str) -> str:
    """Numbers above 0, as --rope-short-factors and its like are written."""
    found = rope.get(key)
    if (
        not isinstance(found, list)
        or not found
        or not all(type(one) in (int, float) and 0 < one < float("inf") for one in found)
    ):
        rope.refuse(f"{rope.inside}{key} {str(found)[:40]}: no list of numbers above 0")
        return "1.0"
    return ",".join(repr(float(one)) for one in found)


def _share(config: ConfigFile, key: str, default: float) -> float:
    """A share of the channels, all of them too."""
    share = config.number(key, default)
    if share > 1:
        config.refuse(f"{config.inside}{key} {share!r}: more than all channels of a head")
    return min(share, 1.0)


def _says(today: Any, scaling: Any, before: float) -> bool:
    """Whether the keys of before repeat those of today; type was rope_type's name once.

    Readers differ in which of the two they follow, and the base of before goes with its scaling.
    """
    if not isinstance(today, dict) or not isinstance(scaling, dict):
        return False
    repeated = {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
    found, repeated = ({"rope_theta": before} | said for said in (today, repeated))
    return all(found.get(key) == value for key, value in repeated.items())


def rotary_out(
    model: ModelConfig, *, base: str = "rope_theta", share: str | None = None
) -> dict[str, Any]:
    """The same as keys, in both ways: readers that know one of them alone find the right base."""
    today: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    before: dict[str, Any] = {base: model.rotary_base}
    kind = model.rope_scaling_type
    if kind in _TYPES:
        before["rope_scaling"] = {"rope_type": kind, **_scaling_out(model)}
        today.update(before["rope_scaling"])
    if kind == "dynamic":  # transformers has no other key for the length beyond which it scales
        before["max_position_embeddings"] = model.rope_original_length
    if share is not None:
        today[_SHARE] = before[share] = model.rotary_percent
    return {"rope_parameters": today, **before}


def _scaling_out(model: ModelConfig) -> dict[str, Any]:
    """The parameters of the type, by their keys."""
    kind, found = model.rope_scaling_type, {}
    for name, kinds in SCALING.items():
        value = getattr(model, name)
        if (
            kind not in kinds
            or value is None
            or (kind, name) == ("dynamic", "rope_original_length")
        ):
            continue
        listed = name in ("rope_short_factors", "rope_long_factors")
        found[_KEYS[name]] = list(listed_numbers(value) or ()) if listed else value
    return found


def with_plain_base(model: ModelConfig) -> ModelConfig:
    """The same with ntk's enlarged base as --rotary-base: what other programs have words for."""
    if model.rope_scaling_type != "ntk":
        return model
    base = scaled_base(model, model.rotated_channels)
    factor = ModelConfig().rope_scaling_factor
    return replace(model, rope_scaling_type="none", rope_scaling_factor=factor, rotary_base=base)
