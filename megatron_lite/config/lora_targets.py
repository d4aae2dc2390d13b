"""What --lora-targets may name, and which of our matrices each name means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from megatron_lite.config.sections.model import ModelConfig

TOKEN_TABLE_TARGET = "embedding.tokens"
_QKV = ("attention.q", "attention.k", "attention.v")
_FC1 = ("mlp.gate", "mlp.up")
LINEAR = (*_QKV, "attention.output", *_FC1, "mlp.down")
"""The matrices of a layer; a gate is there with --swiglu alone."""

TARGETS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "linear": LINEAR, "embedding": (TOKEN_TABLE_TARGET,), "all": (*LINEAR, TOKEN_TABLE_TARGET),
    # Hugging Face's: Llama and its relatives, GPT-2, GPT-NeoX
    "q_proj": ("attention.q",), "k_proj": ("attention.k",), "v_proj": ("attention.v",),
    "o_proj": ("attention.output",), "gate_proj": ("mlp.gate",), "up_proj": ("mlp.up",),
    "down_proj": ("mlp.down",), "embed_tokens": (TOKEN_TABLE_TARGET,),
    "c_attn": _QKV, "c_proj": ("attention.output", "mlp.down"), "c_fc": ("mlp.up",),
    "wte": (TOKEN_TABLE_TARGET,),
    "query_key_value": _QKV, "dense": ("attention.output",), "dense_h_to_4h": ("mlp.up",),
    "dense_4h_to_h": ("mlp.down",), "embed_in": (TOKEN_TABLE_TARGET,),
    # Megatron's
    "linear_qkv": _QKV, "linear_proj": ("attention.output",), "linear_fc1": _FC1,
    "linear_fc2": ("mlp.down",), "word_embeddings": (TOKEN_TABLE_TARGET,),
    **{name: (name,) for name in (*LINEAR, TOKEN_TABLE_TARGET)},
})  # fmt: skip
"""Name -> canonical modules."""

WITHOUT_A_GATE = frozenset(("linear", "all", "linear_fc1"))
"""Names of several matrices, of which a model may lack the gate."""


def unknown_targets(names: Iterable[str]) -> list[str]:
    """Those that mean nothing here."""
    return [name for name in names if name not in TARGETS]


def target_modules(names: Iterable[str], model: ModelConfig) -> frozenset[str]:
    """The canonical modules of a model that known names mean."""
    found = {module for name in names for module in TARGETS[name]}
    return frozenset(found if model.swiglu else found - {"mlp.gate"})
