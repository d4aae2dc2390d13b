"""Rows that run where they are asked for by name, and nowhere else: other people's kernels.

None of them has been measured beside ours here, so none is preferred (`python tools/kernels.py --bench`
measures).  Their packages are imported when a row is asked for; one that is missing, or does not
import, is a reason like any other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lite.kernels.reference import add_dropout_then
from megatron_lite.kernels.table import TABLE, Choice, Implementation, Need


def _liger(name: str) -> Any:
    return getattr(importlib.import_module("liger_kernel.ops"), name)


def _apex_norm() -> Any:
    module = importlib.import_module("apex.normalization.fused_layer_norm")
    importlib.import_module("fused_layer_norm_cuda")  # what its functions call
    return module.fused_layer_norm_affine


def liger_rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Liger-kernel's RMSNorm: one Triton kernel each way; shapes as reference.rms_norm.

    In its mode that computes in fp32 to the end, as ours does.  The gradient it is given belongs to
    the stream as well: it may not be written over.
    """
    fp32, overwrite = "gemma", False
    y: Tensor = _liger("LigerRMSNormFunction").apply(x, weight, epsilon, 0.0, fp32, overwrite)
    return y if bias is None else y + bias


def liger_swiglu(x: Tensor) -> Tensor:
    """Liger-kernel's SwiGLU; it keeps gate and up of the forward and writes their gradients over them.

    Ours lie side by side, so that both are copied first: what it saves is that copy less.
    """
    gate, up = (half.contiguous() for half in x.chunk(2, dim=-1))
    y: Tensor = _liger("LigerSiLUMulFunction").apply(gate, up)
    return y


def apex_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """apex's fused LayerNorm (built from NVIDIA's source); shapes as reference.layer_norm."""
    bias = torch.zeros_like(weight) if bias is None else bias  # its kernel has no form without
    y: Tensor = _apex_norm()(x, weight, bias, (x.shape[-1],), epsilon)
    return y


def _on_a_gpu(load: Callable[[], Any]) -> Callable[[Need], str | None]:
    def usable(need: Need) -> str | None:
        if need.device.type != "cuda":
            return "needs a GPU"
        try:
            load()
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            return f"not importable ({type(error).__name__}: {error})"
        return None

    return usable


_LIGER_NORM = _on_a_gpu(lambda: _liger("LigerRMSNormFunction"))
_LIGER_SWIGLU = _on_a_gpu(lambda: _liger("LigerSiLUMulFunction"))
_APEX_NORM = _on_a_gpu(_apex_norm)

ON_REQUEST: dict[str, list[Implementation]] = {
    "rms_norm": [Implementation("liger", liger_rms_norm, _LIGER_NORM)],
    "add_dropout_rms_norm": [
        Implementation("liger", add_dropout_then(liger_rms_norm), _LIGER_NORM)
    ],
    "swiglu": [Implementation("liger", liger_swiglu, _LIGER_SWIGLU)],
    "layer_norm": [Implementation("apex", apex_layer_norm, _APEX_NORM)],
    "add_dropout_layer_norm": [
        Implementation("apex", add_dropout_then(apex_layer_norm), _APEX_NORM)
    ],
}
"""op -> rows beside those of TABLE."""


class PackageSource(NamedTuple):
    """Where a row's package comes from: an extra of ours, or a guide that says how it is built."""

    extra: str = ""
    guide: str = ""


INSTALLED_BY: Mapping[str, PackageSource] = MappingProxyType(
    {
        "liger": PackageSource(extra="liger"),
        "apex": PackageSource(guide="docs/guides/install-gpu.md"),
    }
)
"""Row -> its source."""


def rows_of(op: str) -> list[Implementation]:
    """All rows of an op: those that are tried in their order, then those that must be asked for."""
    return [*TABLE[op], *ON_REQUEST.get(op, ())]


def requested(op: str, name: str, need: Need) -> Choice | str:
    """The row of this name, or why it cannot run here."""
    row = next(row for row in rows_of(op) if row.name == name)
    reason = row.usable(need)
    if reason is not None:
        return reason
    return Choice(row, f"{op}: {name} (asked for)")
