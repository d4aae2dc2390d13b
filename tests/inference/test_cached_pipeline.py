"""Greedy decoding with a cache over tp and pp, in the forward-only schedule: token for token as without.

Each row of the batch is a micro batch with a cache of its own, in which every stage keeps its layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from megatron_lite.inference.cache import KeyValueCache
from megatron_lite.layers.contexts import ForwardContext
from megatron_lite.layers.outputs import Outputs
from megatron_lite.parallel.collectives import all_gather, all_reduce
from megatron_lite.pipeline.stage import MicroBatch, Scored
from megatron_lite.train.assemble import assemble
from megatron_lite.train.run import Run
from tests.support.axes import PP, SCHEDULE, TP
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, tiny_config

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]]
NEW = 7


@dataclass
class Likeliest:
    """In the place of an objective's loss: notes the likeliest next token of each micro batch."""

    run: Run
    ids: list[Tensor] = field(default_factory=list)

    def __call__(self, outputs: Outputs, batch: MicroBatch) -> Scored:
        """Outputs of [new, 1, v/tp]."""
        logits = outputs.logits()
        logits = all_gather(logits[-1].t().contiguous(), self.run.ctx.tp)  # [v, 1]
        self.ids.append(logits[: self.run.context.vocab_size].argmax(dim=0))
        zero = outputs.x.new_zeros(())
        return Scored(zero, zero)


def next_tokens(run: Run, rows: list[Tensor], caches: list[KeyValueCache | None]) -> Tensor:
    """rows: int64 [new] of each micro batch -> int64 [rows], on every rank."""
    new = len(rows[0])
    batches = []
    for row, cache in zip(rows, caches, strict=True):
        index = torch.arange(new) if cache is None else cache.positions(new, row.device)
        at = ForwardContext(samples=torch.zeros(1, dtype=torch.int64), index=index, cache=cache)
        batches.append(MicroBatch(row[:, None], row[:, None], torch.ones(new, 1), at))
    pick = Likeliest(run)
    for stage in run.pipeline.stages.values():
        stage.score = pick
    run.pipeline.mail.expect(
        (new, 1, run.context.model.hidden_size), run.context.dtype, run.ctx.device
    )
    run.pipeline.run(run.forward_actions(len(rows)), batches, None)
    for cache in caches:
        if cache is not None:
            cache.advance(new)
    chosen = torch.cat(pick.ids) if pick.ids else torch.zeros(len(rows), dtype=torch.int64)
    return all_reduce(chosen, run.ctx.pp)  # zeros but on the last stage


def decoded(rank, ranks, changes, cached):
    """The tokens that follow each prompt."""
    # weights so large that the likeliest token stands out
    config = tiny_config(model__init_method_std=0.2, train__global_batch_size=4, **changes)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    rows = [torch.tensor(prompt) for prompt in PROMPTS]
    caches = [KeyValueCache(len(row) + NEW) if cached else None for row in rows]
    entering = rows
    for _ in range(NEW):
        chosen = next_tokens(run, entering, caches)
        rows = [torch.cat((row, token[None])) for row, token in zip(rows, chosen, strict=True)]
        entering = [row[-1:] for row in rows] if cached else rows
    return [row.tolist()[len(PROMPTS[0]) :] for row in rows]


@pytest.fixture(scope="module")
def uncached():
    found = decoded(0, 1, {}, False)
    assert len({token for row in found for token in row}) > NEW  # not one token again and again
    vocab_size = tiny_config().model.vocab_size
    assert all(token < vocab_size for row in found for token in row)
    return found


def test_with_a_cache_the_same_tokens_follow(uncached):
    assert decoded(0, 1, {}, True) == uncached


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(2, {PP: 2}, id="pp2"),
        pytest.param(2, {TP: 2}, id="tp2", marks=pytest.mark.ci),
        pytest.param(4, {TP: 2, PP: 2}, id="tp2 x pp2", marks=pytest.mark.ci),
        pytest.param(2, {PP: 2, SCHEDULE: "zb-v"}, id="two stages of a rank", marks=pytest.mark.ci),
    ],
)
def test_over_tp_and_pp_the_same_tokens_follow_on_every_rank(uncached, ranks, changes):
    assert spawn(decoded, ranks, changes, True) == [uncached] * ranks
