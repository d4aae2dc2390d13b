"""op -> implementations, best first; choose() says which one runs and why the others do not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lite.kernels import cross_entropy, reference, vendor
from megatron_lite.kernels.compiled import compiled
from megatron_lite.kernels.dropout import dropout
from megatron_lite.kernels.products import added_weight_gradient
from megatron_lite.kernels.reference import add_dropout_then


@dataclass(frozen=True, slots=True)
class Need:
    """What the chosen implementation must cope with.

    storage: the number format of a linear layer's weight, where it is not dtype.
    """

    device: torch.device
    dtype: torch.dtype
    dropout: float = 0.0
    layer_scaling: bool = False
    segments: bool = False
    compile: bool = False
    storage: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to run an op; usable() returns None, or the reason why not."""

    name: str
    run: Callable[..., Any]
    usable: Callable[[Need], str | None]


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation that runs, and a printable line with the reasons."""

    implementation: Implementation
    why: str

    @property
    def run(self) -> Callable[..., Any]:
        """The op itself."""
        return self.implementation.run


def _always(need: Need) -> str | None:
    return None


def _flash(need: Need) -> str | None:
    if need.device.type != "cuda":
        return "needs a GPU"
    if need.dtype not in (torch.float16, torch.bfloat16):
        return f"needs fp16 or bf16, not {need.dtype}"
    if need.layer_scaling or need.segments:
        return "has no layer scaling and no segments"
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError, RuntimeError) as error:
        return f"not importable ({type(error).__name__}: {error})"
    return None


def _sdpa(need: Need) -> str | None:
    if need.layer_scaling:
        return "has no query-key layer scaling"
    if need.dropout > 0.0 and need.device.type == "cpu":
        # no flash kernel there either: the reference costs the same and is exact in every layout
        return "attention dropout on a CPU is exact only in the reference"
    return None


def _adds_in_fp32(need: Need) -> str | None:
    # a tensor without memory stands for a GPU's
    if need.device.type not in ("cuda", "meta"):
        return "needs a GPU"
    if need.dtype not in (torch.float16, torch.bfloat16):
        return f"needs fp16 or bf16, not {need.dtype}"
    return None


def _compile(need: Need) -> str | None:
    return None if need.compile else "--torch-compile is off"


TABLE: dict[str, list[Implementation]] = {
    "linear_forward": [Implementation("reference", reference.linear_forward, _always)],
    "linear_input_gradient": [
        Implementation("reference", reference.linear_input_gradient, _always),
    ],
    "linear_weight_gradient": [
        Implementation("one-product", added_weight_gradient, _adds_in_fp32),
        Implementation("reference", reference.linear_weight_gradient, _always),
    ],
    "split_rotate": [Implementation("reference", reference.split_rotate, _always)],
    "attention": [
        Implementation("flash-attn", vendor.flash, _flash),
        Implementation("torch-sdpa", vendor.sdpa, _sdpa),
        Implementation("reference", reference.attention, _always),
    ],
    "layer_norm": [
        Implementation("torch-compile", compiled(reference.layer_norm), _compile),
        Implementation("reference", reference.layer_norm, _always),
    ],
    "rms_norm": [
        Implementation("torch-compile", compiled(reference.rms_norm), _compile),
        Implementation("reference", reference.rms_norm, _always),
    ],
    "gelu": [
        Implementation("torch-compile", compiled(reference.gelu), _compile),
        Implementation("reference", reference.gelu, _always),
    ],
    "gelu_erf": [
        Implementation("torch-compile", compiled(reference.gelu_erf), _compile),
        Implementation("reference", reference.gelu_erf, _always),
    ],
    "swiglu": [
        Implementation("torch-compile", compiled(reference.swiglu), _compile),
        Implementation("reference", reference.swiglu, _always),
    ],
    "cross_entropy": [Implementation("reference", cross_entropy.scores, _always)],
    "cross_entropy_gradients": [Implementation("reference", cross_entropy.gradients, _always)],
    "dropout": [Implementation("reference", dropout, _always)],
    "add_dropout": [Implementation("reference", reference.add_dropout, _always)],
    "add_dropout_layer_norm": [
        Implementation("torch-compile", add_dropout_then(compiled(reference.layer_norm)), _compile),
        Implementation("reference", add_dropout_then(reference.layer_norm), _always),
    ],
    "add_dropout_rms_norm": [
        Implementation("torch-compile", add_dropout_then(compiled(reference.rms_norm)), _compile),
        Implementation("reference", add_dropout_then(reference.rms_norm), _always),
    ],
}

PREFERENCES: dict[str, list[str]] = {
    "auto": ["flash-attn", "torch-sdpa", "reference"],
    "flash": ["flash-attn", "torch-sdpa", "reference"],
    "fused": ["torch-sdpa", "reference"],
    "unfused": ["reference"],
    "local": ["reference"],
}
"""--attention-backend -> the attention implementations tried, in order."""


def choose(op: str, need: Need, names: list[str] | None = None) -> Choice:
    """The first usable implementation of op among names (all by default)."""
    rows = TABLE[op]
    if names is not None:
        rows = [row for name in names for row in rows if row.name == name]
    passed_over: list[str] = []
    for row in rows:
        reason = row.usable(need)
        if reason is None:
            return Choice(row, f"{op}: {''.join(f'{no} -> ' for no in passed_over)}{row.name}")
        passed_over.append(f"{row.name} no ({reason})")
    raise LookupError(f"no usable implementation of {op}: {'; '.join(passed_over)}")
