"""A compiled piece on tensors without memory: the results' shapes, and what is kept for backward.

No compiler is asked: the piece runs as it is, and keeps what a compiled one would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_KEEPS_INPUT = ("layer_norm", "rms_norm", "gelu", "gelu_erf", "swiglu")
_KEEPS_SUM = ("add_dropout_layer_norm", "add_dropout_rms_norm")
"""The first result; all other pieces make again what backward needs."""


class _Fused(torch.autograd.Function):
    """A piece whose forward and backward are a kernel each, without anything in between."""

    @staticmethod
    def forward(ctx: Any, name: str, run: Callable[..., Any], *inputs: Any) -> Any:
        results = run(*inputs)
        if name in _KEEPS_INPUT:
            ctx.save_for_backward(inputs[0])
        elif name in _KEEPS_SUM:
            ctx.save_for_backward(results[0])
        ctx.forms = [
            (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else None for x in inputs
        ]
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        made = (
            torch.empty(form[0], dtype=form[1], device=form[2]) if form and needed else None
            for form, needed in zip(ctx.forms, ctx.needs_input_grad[2:], strict=True)
        )
        return None, None, *made


def run_fused(name: str, run: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """run(*inputs) of the piece with this name, keeping what a compiled one keeps."""
    return _Fused.apply(name, run, *inputs)
