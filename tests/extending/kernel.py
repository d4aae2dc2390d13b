"""A kernel from outside the package: --extend tests/extending/kernel.py; it is usable, so it is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.kernels.table import TABLE, Implementation, Need


def gelu(x: Tensor) -> Tensor:
    """x: [...] -> [...]; the tanh form, as (1 + tanh z) / 2 = sigmoid(2 z)."""
    return x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3))


def usable(need: Need) -> str | None:
    """Everywhere but where it would round more than the reference."""
    return None if need.dtype == torch.float32 else f"is for fp32, not {need.dtype}"


TABLE["gelu"].insert(0, Implementation("sigmoid", gelu, usable))
