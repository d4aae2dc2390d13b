"""--check-collectives stops both sides of a mismatch with each one's call; real gloo ranks, real faults."""

import dataclasses

import pytest
import torch
from torch.distributed import PrefixStore, distributed_c10d

from megatron_lite.blueprint.schedules.actions import Action
from megatron_lite.config.errors import DistributedError
from megatron_lite.parallel.calls.checking import Checker
from megatron_lite.parallel.collectives import all_reduce, barrier, gather_text
from megatron_lite.parallel.context import Axis
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import PP, TP
from tests.support.launch import TINY, launch
from tests.support.sizes import with_flags
from tests.support.spawn import RankFailed, spawn
from tests.support.tiny import context, draw, make_batches, tiny_config


def without_the_sum(run) -> None:
    """The last block's second projection is not summed over tp."""
    (stage,) = run.pipeline.stages.values()
    down = stage.module.blocks["3"].mlp.down
    alone = dataclasses.replace(down.context.ctx, tp=Axis("tp"))
    down.context = dataclasses.replace(down.context, ctx=alone)


def half_a_sequence(run) -> None:
    """Its activations have half the length."""
    (stage,) = run.pipeline.stages.values()
    forward = stage.module.forward
    stage.module.forward = lambda x, at: forward(x, at)[: x.shape[0] // 2]


def late_activation(run) -> None:
    """The first activation is sent after the second one."""
    groups = list(run.blueprint.actions(4)[0])
    moved = (Action.parse("0SEND_F0"),)
    groups.remove(moved)
    second = next(n for n, g in enumerate(groups) if Action.parse("0SEND_F1") in g)
    groups.insert(second + 1, moved)
    carry_out = type(run.pipeline).run

    class Reordered(type(run.pipeline)):
        __slots__ = ()

        def run(self, actions, batches, scale):
            return carry_out(self, groups, batches, scale)

    fields = dataclasses.fields(run.pipeline)
    run.pipeline = Reordered(**{f.name: getattr(run.pipeline, f.name) for f in fields})


FAULTS = {"none": lambda run: None, "sum": without_the_sum, "half": half_a_sequence,
          "late": late_activation}  # fmt: skip


def step(rank, ranks, changes, fault, on):
    """The loss of one step under the checker, or what it said."""
    config = tiny_config(train__global_batch_size=8, **changes)
    blueprint = draw(config, ranks)
    batches = make_batches(config, blueprint, 0, 0)
    if ranks == 1:
        run = assemble(config, blueprint, context(blueprint, rank))
        return float(train_step(run, batches, lr=1e-3, weight_decay=0.0).loss)
    store = PrefixStore("calls", distributed_c10d._get_default_store())
    ctx = context(blueprint, rank)
    checker = Checker(store, rank=rank, pp=ctx.pp.rank, step=lambda: 0, seconds=5.0)
    run = assemble(config, blueprint, ctx.observed(checker))
    run.pipeline.reached = checker.reached
    if rank == on:
        FAULTS[fault](run)
    try:
        return float(train_step(run, batches, lr=1e-3, weight_decay=0.0).loss)
    except DistributedError as error:
        if PP in changes:
            raise  # the others wait for a message that will not come
        return str(error)


def test_a_sound_step_passes_and_gives_the_same_loss() -> None:
    serial = spawn(step, 1, {}, "none", None)
    both = spawn(step, 4, {TP: 2, PP: 2}, "none", None)
    assert both == pytest.approx(serial * 4, rel=1e-5)


def test_a_skipped_sum_is_named_on_every_rank_with_both_calls() -> None:
    said = spawn(step, 2, {TP: 2}, "sum", 1)
    for text in said:
        assert "over tp of ranks 0, 1 does not fit" in text
        assert "rank 0, iteration 1, action 1 (0F0): all-reduce (sum) [16, 2, 32] float32" in text
        assert "rank 1, iteration 1, action 1 (0F0): all-reduce" in text
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("half", ["activation into stage 1, micro batch 0) [8, 2, 32]", "micro batch 0) [16, 2, 32]"]),
        ("late", ["activation into stage 1, micro batch 1) [16, 2, 32]", "micro batch 0) [16, 2, 32]"]),
    ],
)  # fmt: skip
def test_a_message_that_does_not_fit_is_named_by_its_receiver(fault, words) -> None:
    with pytest.raises(RankFailed) as caught:
        spawn(step, 2, {PP: 2}, fault, 0)
    text = caught.value.errors[1]
    assert "a message from rank 0 to rank 1 does not fit" in text
    for word in words:
        assert word in text


def test_a_rank_that_does_not_come_is_named_with_where_it_is() -> None:
    said = spawn(alone_in_the_sum, 2)
    assert "rank 1 did not come within 0.5 s" in said[0]
    assert "rank 0, before its list: all-reduce (sum) [3] float32" in said[0]
    assert "rank 1 was last at world, before its list: barrier" in said[0]


def alone_in_the_sum(rank, ranks):
    """Rank 0 sums, rank 1 has nothing more to say."""
    store = PrefixStore("calls", distributed_c10d._get_default_store())
    checker = Checker(store, rank=rank, pp=0, step=lambda: 0, seconds=0.5)
    ctx = context(draw(tiny_config(), ranks), rank).observed(checker)
    assert gather_text("a" * (rank + 1), ctx.world, ctx.device) == ([] if rank else ["a", "aa"])
    barrier(ctx.world)
    try:
        if rank == 0:
            all_reduce(torch.zeros(3), ctx.world)
    except DistributedError as error:
        return str(error)
    return ""


def test_the_flag_checks_a_whole_run_of_the_tool() -> None:
    flags = with_flags(TINY, "--check-collectives", "--train-iters", "2", "--timing-log-level", "1")
    assert [(ended.rc, ended.err[-500:]) for ended in launch(2, flags) if ended.rc] == []
