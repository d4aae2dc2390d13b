"""Layouts in which each family's own parts are trained: what it has beyond GPT-2 and Llama."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tests.parity.kinds import (
    CHUNKS2,
    EVERY_LAYER,
    EXACT,
    LLAMA,
    OVERLAP_GATHER,
    SELECTIVE,
    SP,
    UNTIED,
    ZB_H1,
    ZB_V,
    ZERO,
    Layout,
    Tolerance,
    layout,
)

PARTS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "mistral": LLAMA | {"model__window_size": "6,0"},
    "qwen3": LLAMA | {"model__qk_layernorm": True},
    "gpt_neox": UNTIED | {
        "model__position_embedding_type": "rope", "model__rotary_percent": 0.5,
        "model__parallel_residual": True, "model__gelu": "erf",
    },
    "qwen2": LLAMA | {"model__add_qkv_bias": True},
    "s2": LLAMA | {"model__s2_attention": True, "model__attention_dropout": 0.0},
    "interleaved": LLAMA | {"model__rotary_interleaved": True, "model__rotary_percent": 0.5},
})  # fmt: skip
"""Family -> what its models have."""


ADAM = {"qwen3": Tolerance(loss=2e-3)}
"""Under a norm the length of q and k moves nothing: Adam makes full steps of what rounding leaves of such
gradients.  Gradients and SGD's parameters agree as everywhere."""


def _layouts(name: str, parts: Mapping[str, Any]) -> list[Layout]:
    shared = dict(parts)
    return [
        dataclasses.replace(row, tolerance=ADAM.get(name, EXACT)) for row in _rows(name, shared)
    ]


def _rows(name: str, shared: dict[str, Any]) -> list[Layout]:
    return [
        layout(f"tp2-pp2-sp-recompute-{name}", tp=2, pp=2, shared=shared, **SP, **EVERY_LAYER),
        layout(f"tp2-{name}", tp=2, shared=shared),
        layout(f"pp2-{name}", pp=2, shared=shared),
        layout(f"tp2-sp-recompute-selective-{name}", tp=2, shared=shared, **SP, **SELECTIVE),
        layout(f"tp2-pp2-{name}", tp=2, pp=2, shared=shared),
    ]


_ROPE = LLAMA | {"model__rope_scaling_factor": 4.0}
_SHORT = {"model__rope_original_length": 8}
SCALING: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "yarn": _SHORT | {"model__rope_beta_fast": 2.0, "model__rope_beta_slow": 0.5},
    "longrope": _SHORT | {
        "model__rope_short_factors": "1,1,1,1", "model__rope_long_factors": "1,1.5,2,4"},
    "dynamic": _SHORT, "llama3": _SHORT, "linear": {}, "ntk": {},
})  # fmt: skip
"""--rope-scaling-type -> its parameters, of positions that samples go beyond."""

CLEX = _ROPE | _SHORT | {"model__rope_scaling_type": "clex"}
"""What its stages learn together has a gradient of all layers."""

FAMILY_LAYOUTS = {name: _layouts(name, parts) for name, parts in PARTS.items()} | {
    "scaling": [
        layout(
            f"tp2-pp2-sp-recompute-{kind}", tp=2, pp=2, **SP, **EVERY_LAYER,
            shared=_ROPE | dict(parts) | {"model__rope_scaling_type": kind},
        )
        for kind, parts in SCALING.items()
    ],
    "clex": [
        *_layouts("clex", CLEX),
        layout("pp2-zb-v-clex", pp=2, shared=CLEX, **ZB_V),
        layout("tp2-pp2-zb-h1-clex", tp=2, pp=2, shared=CLEX, **ZB_H1),
        layout("pp2-dp2-interleaved-zero-clex", pp=2, dp=2, shared=CLEX,
               **CHUNKS2, **ZERO, **OVERLAP_GATHER),
        layout("pp3-head-alone-clex", pp=3, shared=CLEX,
               parallel__pipeline_model_parallel_layout="Ettt|t|L"),
    ],
}  # fmt: skip
"""Family -> its layouts; the first has the most in it."""
