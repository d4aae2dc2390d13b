"""Activation checkpointing: keep the input of some layers and recompute the rest in backward.

Which layers and parts is blueprint/recompute.py's plan.  Nothing random is restored: dropout masks
are functions of coordinates and come out the same again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_lite.blueprint.recompute import RecomputePlan
from megatron_lite.parallel.collectives import all_gather, local_slice
from megatron_lite.parallel.context import Axis


def recomputed_part(
    plan: RecomputePlan, name: str, run: Callable[..., Tensor], *inputs: Any
) -> Tensor:
    """run(*inputs), recomputed in backward if --recompute-modules names this part.

    Its inputs stay in memory, what it computes in between does not.
    """
    if name not in plan.modules or not torch.is_grad_enabled():
        return run(*inputs)
    result: Tensor = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


class _Again(torch.autograd.Function):
    """Forward without a graph; backward runs forward again and then backward through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], axis: Axis) -> Tensor:
        ctx.run, ctx.axis = run, axis
        # a copy of the slice: a view would keep the whole input alive
        kept = x if axis.size == 1 else local_slice(x, axis).clone()
        ctx.save_for_backward(kept)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        (kept,) = ctx.saved_tensors
        x = all_gather(kept, ctx.axis).detach().requires_grad_(True)
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, dy)
        return x.grad, None, None


def recomputed(run: Callable[[Tensor], Tensor], x: Tensor, axis: Axis) -> Tensor:
    """run(x) with only x kept for backward, or this rank's slice of it where axis has size > 1.

    x: [s/tp, b, h] with sequence parallelism (pass a size-1 axis), else [s, b, h].
    """
    if not torch.is_grad_enabled():
        return run(x)
    result: Tensor = _Again.apply(x, run, axis)
    return result
