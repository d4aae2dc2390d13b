"""One optimizer step, and one evaluation batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_lite.data.batch import Batch
from megatron_lite.engines.base import Update
from megatron_lite.parallel.collectives import all_reduce
from megatron_lite.pipeline.stage import Scored
from megatron_lite.train.feed import loss_tokens, to_device
from megatron_lite.train.stop import NO_VOTE, StopVote

if TYPE_CHECKING:
    from megatron_lite.train.assemble import Run


@dataclass(frozen=True, slots=True)
class StepResult:
    """loss: mean per token over the global batch; votes: ranks that ask for a stop, by StopVote's fields."""

    loss: Tensor
    update: Update
    votes: Tensor


def train_step(run: Run, batches: Sequence[Batch], *, lr: float, weight_decay: float,
               vote: StopVote = NO_VOTE) -> StepResult:  # fmt: skip
    """Forward and backward over this rank's micro batches, then the update.  Collective over the world.

    The gradient is that of the mean loss per token over the whole global batch: each micro batch's
    loss sum is scaled by 1 / global tokens, which is known before the first forward.
    """
    device = run.ctx.device
    tokens = all_reduce(loss_tokens(batches, device), run.ctx.dp)
    micro = [to_device(b, device, step=run.progress.step, training=True) for b in batches]
    scale = (run.engine.loss_scale / tokens.clamp(min=1.0)).float()
    run.expect_messages(batches[0])
    with run.timers.span("forward-backward"):
        scored = run.pipeline.run(run.actions(len(batches)), micro, scale)
    total, _, votes = _sum_over_world(run, scored, vote)
    with run.timers.span("optimizer"):
        update = run.engine.step(lr=lr, weight_decay=weight_decay)
    return StepResult(total / tokens, update, votes)


@torch.no_grad()
def evaluation_step(run: Run, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Loss sum and token count of one global batch over the world, fp64 scalars."""
    device = run.ctx.device
    micro = [to_device(b, device, step=run.progress.step, training=False) for b in batches]
    run.expect_messages(batches[0])
    scored = run.pipeline.run(run.forward_actions(len(batches)), micro, None)
    total, count, _ = _sum_over_world(run, scored, NO_VOTE)
    return total, count


def _sum_over_world(
    run: Run, scored: Sequence[Scored], vote: StopVote
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum, token count and stop votes; one collective, contributed by tp rank 0 only."""
    sums = torch.zeros(2 + len(vote), dtype=torch.float64, device=run.ctx.device)
    if scored and run.ctx.tp.rank == 0:
        sums[0] = torch.stack([s.total for s in scored]).double().sum()
        sums[1] = torch.stack([s.count for s in scored]).double().sum()
    for position, asked in enumerate(vote, start=2):
        if asked:
            sums[position] = 1.0
    all_reduce(sums, run.ctx.world)
    return sums[0], sums[1], sums[2:]
