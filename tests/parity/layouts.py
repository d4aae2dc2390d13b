"""The one table of named layouts, and how a layout is trained for a few steps on gloo ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_lite.parallel.collectives import all_reduce
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.tiny import context, draw, make_batches, tiny_config


@dataclass(frozen=True)
class Layout:
    """A name, its world size and what it changes in the tiny configuration."""

    name: str
    ranks: int = 1
    changes: dict[str, Any] = field(default_factory=dict)


def layout(name: str, *, tp: int = 1, pp: int = 1, dp: int = 1, **changes: Any) -> Layout:
    """A layout of tp x pp x dp ranks."""
    sizes = {
        "parallel__tensor_model_parallel_size": tp,
        "parallel__pipeline_model_parallel_size": pp,
    }
    return Layout(name, tp * pp * dp, sizes | changes)


SP = {"parallel__sequence_parallel": True}

LAYOUTS = [
    layout("tp2", tp=2),
    layout("tp4", tp=4),
    layout("tp2-sp", tp=2, **SP),
    layout("pp2", pp=2),
    layout("pp4", pp=4),
    layout("dp2", dp=2),
    layout("dp4", dp=4),
    layout("tp2-pp2", tp=2, pp=2),
    layout("tp2-dp2", tp=2, dp=2),
    layout("pp2-dp2", pp=2, dp=2),
    layout("tp2-pp2-dp2", tp=2, pp=2, dp=2),
    layout("tp2-pp2-dp2-sp", tp=2, pp=2, dp=2, **SP),
    layout("micro-1x8", train__micro_batch_size=8),
    layout("micro-8x1", train__micro_batch_size=1),
]


@dataclass(frozen=True)
class Curve:
    """What one rank saw: loss and gradient norm of each step."""

    losses: list[float]
    grad_norms: list[float]


def train_layout(
    rank: int, ranks: int, changes: dict[str, Any], steps: int, ragged: bool = False
) -> Curve:
    """Train the tiny model for some steps in this layout; runs on every rank of it."""
    torch.set_num_threads(1)
    config = tiny_config(**changes)
    blueprint = draw(config, ranks)
    ctx = context(blueprint, rank)
    run = assemble(config, blueprint, ctx)
    losses, norms = [], []
    for step in range(steps):
        run.progress.step = step
        batches = make_batches(config, blueprint, ctx.dp.rank, step, ragged=ragged)
        assert config.learning_rate.lr is not None
        result = train_step(run, batches, lr=config.learning_rate.lr, weight_decay=0.1)
        losses.append(result.loss.item())
        norms.append(result.update.grad_norm.item())
    all_reduce(torch.zeros(1), ctx.world)
    return Curve(losses, norms)
