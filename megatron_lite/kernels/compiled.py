"""The pointwise ops of reference.py through torch.compile: one fused kernel instead of several.

Matrix products and attention stay as they are; compiled pieces need no CUDA toolkit (Triton comes
with torch) and on a CPU a C++ compiler.  Each is compiled on its first call, which takes seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lite.kernels import reference


@functools.cache
def _compiled(op: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(op, dynamic=False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """x: [..., h] -> [..., h]; see reference.layer_norm."""
    return _compiled(reference.layer_norm)(x, weight, bias, epsilon)


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """x: [..., h] -> [..., h]; see reference.rms_norm."""
    return _compiled(reference.rms_norm)(x, weight, bias, epsilon)


def gelu(x: Tensor) -> Tensor:
    """x: [...] -> [...]; see reference.gelu."""
    return _compiled(reference.gelu)(x)


def gelu_erf(x: Tensor) -> Tensor:
    """x: [...] -> [...]; see reference.gelu_erf."""
    return _compiled(reference.gelu_erf)(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; see reference.swiglu."""
    return _compiled(reference.swiglu)(gate, up)
