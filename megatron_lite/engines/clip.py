"""One global gradient norm across tp and pp; shared and replicated parameters count once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lite.parallel.collectives import all_reduce
from megatron_lite.parallel.context import ParallelContext


def global_norm(tensors: Sequence[Tensor], ctx: ParallelContext) -> Tensor:
    """The L2 norm (fp32 scalar on the device) of the counted tensors over tp and pp.

    Collective over ctx.model.  Infinite or nan if any element on any rank is.
    """
    total = torch.zeros((), device=ctx.device)
    if tensors:
        norms = torch._foreach_norm([t.float() for t in tensors])
        total = torch.stack(norms).square().sum()
    return all_reduce(total, ctx.model).sqrt()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)) on the device, as Megatron does."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def count_zeros(tensors: Sequence[Tensor], ctx: ParallelContext) -> Tensor:
    """How many elements of the counted tensors are zero, over tp and pp (fp64 scalar)."""
    total = torch.zeros((), device=ctx.device, dtype=torch.float64)
    for tensor in tensors:
        total += tensor.numel() - tensor.count_nonzero()
    return all_reduce(total, ctx.model)
