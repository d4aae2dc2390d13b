"""One global gradient norm across tp and pp; shared and replicated parameters count once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lite.parallel.collectives import all_reduce
from megatron_lite.parallel.context import Axis


def global_norm(tensors: Sequence[Tensor], axis: Axis, device: torch.device) -> Tensor:
    """The L2 norm (fp32 scalar on the device) of the ranks' tensors, of any shapes, together.

    Pass only what this rank stands for, or replicas count twice.
    Collective over the axis (tp x pp, and dp where the ranks hold shards).  Infinite or nan if any
    element on any rank is.
    """
    total = torch.zeros((), device=device)
    if tensors:
        norms = torch._foreach_norm([t.float() for t in tensors])
        total = torch.stack(norms).square().sum()
    return all_reduce(total, axis).sqrt()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """norm: scalar -> scalar min(1, max_norm / (norm + 1e-6)), on the device; Megatron's epsilon."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def count_zeros(tensors: Sequence[Tensor], axis: Axis, device: torch.device) -> Tensor:
    """How many elements of the ranks' tensors are zero (fp64 scalar).  Collective over the axis."""
    total = torch.zeros((), device=device, dtype=torch.float64)
    for tensor in tensors:
        total += tensor.numel() - tensor.count_nonzero()
    return all_reduce(total, axis)
