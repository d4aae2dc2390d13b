"""Activation checkpointing: keep the input of some layers and compute the rest again in backward.

    full uniform N   groups of N layers; only each group's input is kept
    full block N     the first N layers of a stage, one by one; the others keep everything
    selective        parts of a block: core_attn, mlp, layernorm (arXiv:2205.05198)

Nothing random is restored: dropout masks are functions of coordinates and come out the same again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.parallel.collectives import all_gather, local_slice
from megatron_lite.parallel.context import Axis

MODULES = ("core_attn", "mlp", "layernorm")
"""What --recompute-modules may name."""


@dataclass(frozen=True, slots=True)
class Recompute:
    """What a stage computes again; the default keeps everything."""

    modules: frozenset[str] = frozenset()
    group: int = 0
    """Layers per recomputed group; 0 recomputes no whole layers."""

    layers: int | None = None
    """Only the first so many layers of the stage; None means all."""

    split: bool = False
    """Keep only this tp rank's slice of a group's input (--distribute-saved-activations)."""

    @classmethod
    def from_config(cls, parallel: ParallelConfig) -> Recompute:
        """The plan of the recompute flags, which rules.py has checked together."""
        if parallel.recompute_granularity is None:
            return cls()
        if parallel.recompute_granularity == "selective":
            return cls(modules=frozenset(parallel.recompute_modules))
        count = parallel.recompute_num_layers or 1
        split = parallel.distribute_saved_activations
        if parallel.recompute_method == "block":
            return cls(group=1, layers=count, split=split)
        return cls(group=count, split=split)

    def groups(self, num_layers: int) -> list[tuple[range, bool]]:
        """(positions of layers on the stage, whether they are recomputed) in order."""
        if not self.group:
            return [(range(num_layers), False)]
        until = num_layers if self.layers is None else min(self.layers, num_layers)
        cut = [
            (range(start, min(start + self.group, until)), True)
            for start in range(0, until, self.group)
        ]
        return [*cut, (range(until, num_layers), False)] if until < num_layers else cut

    def part(self, name: str, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """run(*inputs), computed again in backward if --recompute-modules names this part.

        Its inputs stay in memory, what it computes in between does not.
        """
        if name not in self.modules or not torch.is_grad_enabled():
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
