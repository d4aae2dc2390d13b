"""A step with decoupled weight decay, on lists of tensors; left out where the device does not take it."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]
"""What torch's functions of lists take and return."""


def step_by(
    parameters: Tensors,
    change: Tensors,
    lr: float,
    weight_decay: float,
    taken: Tensor | None,
) -> None:
    """theta = (1 - lr wd) theta - lr change; where it is not taken, theta keeps its bits."""
    if taken is None:
        if weight_decay:
            torch._foreach_mul_(parameters, 1.0 - lr * weight_decay)
        torch._foreach_add_(parameters, change, alpha=-lr)
        return
    new = torch._foreach_mul(parameters, 1.0 - lr * weight_decay)
    torch._foreach_add_(new, change, alpha=-lr)
    keep(parameters, new, taken)


def keep(tensors: Tensors, new: Tensors, taken: Tensor | None) -> None:
    """The new values; where an update is not taken, the bits that are there."""
    for there, value in zip(tensors, new, strict=True):
        if taken is None:
            there.copy_(value)
        else:
            torch.where(taken, value, there, out=there)
