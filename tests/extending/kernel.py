"""A kernel from outside the package: --extend tests/extending/kernel.py; where it is usable, it is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.kernels.table import TABLE, Implementation, Need


def swiglu(x: Tensor) -> Tensor:
    """[..., 2f] of gate and up -> silu(gate) * up, written out."""
    gate, up = x.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def usable(need: Need) -> str | None:
    """None, or why not here: in fewer bits it would round once more than the reference."""
    return None if need.dtype == torch.float32 else f"is for fp32, not {need.dtype}"


TABLE["swiglu"].insert(0, Implementation("written-out", swiglu, usable))
