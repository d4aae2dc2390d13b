"""One global gradient norm across tp and pp, where what is shared or replicated counts once; other sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lite.parallel.collectives import all_reduce
from megatron_lite.parallel.context import Axis


def squared_norms(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The squared L2 norm of each tensor, fp64 [n] on the device; not finite where an element is not.

    Tensors may lie in host memory, too.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device=device)
    norms = torch._foreach_norm([t.float() for t in tensors])
    return torch.stack([norm.to(device) for norm in norms]).double().square()


def global_norm(tensors: Sequence[Tensor], axis: Axis, device: torch.device) -> Tensor:
    """The L2 norm (fp32 scalar on the device) of the ranks' tensors, of any shapes, together.

    Pass only what this rank stands for, or replicas count twice.
    Collective over the axis (tp x pp, and dp where the ranks hold shards).  Infinite or nan if any
    element on any rank is.
    """
    return all_reduce(squared_norms(tensors, device).sum(), axis).sqrt().float()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """norm: scalar -> scalar min(1, max_norm / (norm + 1e-6)), on the device; Megatron's epsilon."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def count_zeros(tensors: Sequence[Tensor], axis: Axis, device: torch.device) -> Tensor:
    """How many elements of the ranks' tensors are zero (fp64 scalar).  Collective over the axis."""
    total = torch.zeros((), device=device, dtype=torch.float64)
    for tensor in tensors:
        total += tensor.numel() - tensor.count_nonzero()
    return all_reduce(total, axis)


def sum_together(tensors: Sequence[Tensor], axis: Axis) -> None:
    """In place, over the axis; many and small ones, so that one call for all costs one latency."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    all_reduce(flat, axis)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, summed in zip(tensors, flat.split(sizes), strict=True):
        tensor.copy_(summed.view_as(tensor))
