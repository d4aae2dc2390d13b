"""op -> implementations, best first; choose() says which one runs and why the others do not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lite.kernels import cross_entropy, documents, flash, nf4, reference, vendor
from megatron_lite.kernels.dropout import dropout
from megatron_lite.kernels.products import added_weight_gradient
from megatron_lite.kernels.reference import add_dropout_then


@dataclass(frozen=True, slots=True)
class Need:
    """What the chosen implementation must cope with.

    storage: the number format of a linear layer's weight, where it is not dtype.
    capability: of the GPU, (9, 0) for sm90; None on a CPU.  In a rehearsal the device is meta, and this
    is of the GPU that it stands for.
    seen: the rows of a cache stand at unequal lengths: a mask says what each sees.
    length, head_size: tokens of a row, and features of a head, where they are known.
    backend: --attention-backend.
    """

    device: torch.device
    dtype: torch.dtype
    dropout: float = 0.0
    layer_scaling: bool = False
    segments: bool = False
    window: bool = False
    seen: bool = False
    compile: bool = False
    storage: torch.dtype | None = None
    capability: tuple[int, int] | None = None
    length: int | None = None
    head_size: int | None = None
    backend: str = "auto"


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to run an op; usable() returns None, or the reason why not.

    for_masks: it is for documents and windows alone, and not worth a word where there are none.
    fusible: a pure function of tensors without a matrix product or communication in it: what
    --torch-compile makes one kernel of (compiled.py).
    uncompiled: what runs instead once the compiler failed, where that is not run itself.
    """

    name: str
    run: Callable[..., Any]
    usable: Callable[[Need], str | None]
    for_masks: bool = False
    fusible: bool = False
    uncompiled: Callable[..., Any] | None = None


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


_FLEX_LENGTH = 1024
"""Tokens of a row from which on FlexAttention is faster than varlen."""


def _on_a_gpu(need: Need) -> str | None:
    """What every fused kernel but torch's scaled_dot_product_attention wants."""
    if need.capability is None and need.device.type != "cuda":
        return "needs a GPU"
    if need.dtype not in (torch.float16, torch.bfloat16):
        return f"needs fp16 or bf16, not {need.dtype}"
    if need.seen:
        return "takes no mask"
    return "has no layer scaling" if need.layer_scaling else None


def _flash_shapes(need: Need, largest: int = 256) -> str | None:
    if need.capability is not None and need.capability < (8, 0):
        return f"needs sm80 or newer, not sm{need.capability[0]}{need.capability[1]}"
    if need.head_size is not None and (need.head_size % 8 or need.head_size > largest):
        return f"wants heads of 8, 16, ... {largest} features, not {need.head_size}"
    return None


def _torchs_window(need: Need) -> str | None:
    if need.window and not documents.varlen_options(documents.varlen_attn()).windows:
        return "has no window before torch 2.11"
    return None


def _importable(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return f"not importable ({type(error).__name__}: {error})"
    return None


def _flash(need: Need) -> str | None:
    if need.device.type != "cuda":
        return "needs a GPU"
    reason = _on_a_gpu(need) or _flash_shapes(need)
    if reason is not None:
        return reason
    # of torch's own, only a dense mask has dropout between documents, or in a window
    alone = (need.segments or need.window) and need.dropout > 0.0
    if need.backend == "auto" and (need.capability or (0, 0)) >= (9, 0) and not alone:
        return "torch's own is faster from sm90 on; --attention-backend flash takes it"
    return _importable("flash_attn")


def _flash_4(need: Need) -> str | None:
    if need.device.type != "cuda":
        return "needs a GPU"
    if need.capability is not None and need.capability[0] not in (9, 10):
        return f"needs sm90 or sm100, not sm{need.capability[0]}{need.capability[1]}"
    if need.dropout > 0.0:
        return "has no attention dropout"
    if reason := _torchs_window(need):
        return reason
    return _on_a_gpu(need) or _flash_shapes(need, 128) or _importable("flash_attn.cute.interface")


def _flex(need: Need) -> str | None:
    reason = _on_a_gpu(need)
    if reason is not None:
        return reason
    if need.dropout > 0.0:
        return "has no attention dropout"
    if need.head_size is not None and need.head_size < 16:
        return f"wants heads of 16 features or more, not {need.head_size}"
    if need.length is not None and need.length < _FLEX_LENGTH:
        return f"loses below {_FLEX_LENGTH} tokens, and a row has {need.length}"
    return _compile(need)


def _varlen(need: Need) -> str | None:
    if need.dropout > 0.0:
        return _on_a_gpu(need) or "has no attention dropout"
    return _torchs_window(need) or _on_a_gpu(need) or _flash_shapes(need)


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


def _bitsandbytes(need: Need) -> str | None:
    if need.device.type != "cuda":
        return "needs a GPU"
    return _importable("bitsandbytes")


def _compile(need: Need) -> str | None:
    return None if need.compile else "nothing is compiled"


def _in_registers(need: Need) -> str | None:
    # whoever counts memory sees the fp32 values that a compiled kernel never stores
    return "is only for a compiler" if need.device.type == "meta" else _compile(need)


def _pointwise(run: Callable[..., Any]) -> list[Implementation]:
    return [Implementation("reference", run, _always, fusible=True)]


def _one_kernel(run: Callable[..., Any], uncompiled: Callable[..., Any]) -> Implementation:
    return Implementation("at-once", run, _in_registers, fusible=True, uncompiled=uncompiled)


TABLE: dict[str, list[Implementation]] = {
    "linear_forward": [Implementation("reference", reference.linear_forward, _always)],
    "linear_input_gradient": [
        Implementation("reference", reference.linear_input_gradient, _always),
    ],
    "linear_weight_gradient": [
        Implementation("one-product", added_weight_gradient, _adds_in_fp32),
        Implementation("reference", reference.linear_weight_gradient, _always),
    ],
    "unpack_nf4": [
        Implementation("bitsandbytes", nf4.unpack_by_bitsandbytes, _bitsandbytes),
        _one_kernel(nf4.unpack_at_once, nf4.unpack),
        Implementation("reference", nf4.unpack, _always),
    ],
    "split_rotate": _pointwise(reference.split_rotate),
    "rotate_heads": _pointwise(reference.rotate_heads),
    "attention": [
        Implementation("flash-attn-4", flash.flash_4, _flash_4),
        Implementation("flash-attn", flash.flash, _flash),
        Implementation("torch-flex", documents.flex, _flex, for_masks=True),
        Implementation("torch-varlen", documents.varlen, _varlen, for_masks=True),
        Implementation("torch-sdpa", vendor.sdpa, _sdpa),
        Implementation("reference", reference.attention, _always),
    ],
    "layer_norm": _pointwise(reference.layer_norm),
    "rms_norm": _pointwise(reference.rms_norm),
    "gelu": _pointwise(reference.gelu),
    "gelu_erf": _pointwise(reference.gelu_erf),
    "swiglu": _pointwise(reference.swiglu),
    "cross_entropy": [
        _one_kernel(cross_entropy.scores_at_once, cross_entropy.scores),
        Implementation("reference", cross_entropy.scores, _always),
    ],
    "cross_entropy_gradients": [
        _one_kernel(cross_entropy.gradients_at_once, cross_entropy.gradients),
        Implementation("reference", cross_entropy.gradients, _always),
    ],
    "dropout": _pointwise(dropout),
    "add_dropout": _pointwise(reference.add_dropout),
    "add_dropout_layer_norm": _pointwise(add_dropout_then(reference.layer_norm)),
    "add_dropout_rms_norm": _pointwise(add_dropout_then(reference.rms_norm)),
}

_TORCH = ["torch-flex", "torch-varlen", "torch-sdpa", "reference"]

PREFERENCES: dict[str, list[str]] = {
    "auto": ["flash-attn", *_TORCH],
    "flash": ["flash-attn", *_TORCH],
    "fa4": ["flash-attn-4", *_TORCH],
    "fused": _TORCH,
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
        if row.for_masks and not (need.segments or need.window):
            continue
        reason = row.usable(need)
        if reason is None:
            return Choice(row, f"{op}: {''.join(f'{no} -> ' for no in passed_over)}{row.name}")
        passed_over.append(f"{row.name} no ({reason})")
    raise LookupError(f"no usable implementation of {op}: {'; '.join(passed_over)}")
