"""The rehearsal says what a real run says, and names what would not fit; each fault is in a rank's own run."""

import dataclasses
from collections import Counter

import pytest
import torch

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.blueprint.schedules.actions import Action
from megatron_lite.config.errors import DistributedError
from megatron_lite.parallel.calls.log import compare_calls
from megatron_lite.parallel.collectives import all_reduce
from megatron_lite.parallel.context import Axis
from megatron_lite.rehearsal.footprint import Footprint
from megatron_lite.rehearsal.rehearse import (
    one_of_each,
    rehearse_rank,
    require_agreement,
    stand_in,
)
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import BF16, PP, SCHEDULE, SP, TP, ZERO
from tests.support.engines import named
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config
from tests.support.traffic import traffic

BATCH = "train__global_batch_size"

FORMS: dict = {}
"""What all tests of this file have learnt of operations' shapes."""


def rehearsed(config, world_size, ranks=None, *, on=None, tamper=None, changed=None):
    """Call logs of the ranks; on rank `on`, tamper(stand-in) before its step, or another config."""
    blueprint = draw(config, world_size)
    logs = []
    for rank in range(world_size) if ranks is None else ranks:
        mine = changed if changed is not None and rank == on else config
        with stand_in(mine, draw(mine, world_size), rank, FORMS) as actor:
            if tamper is not None and rank == on:
                tamper(actor)
            logs.append(actor.perform().log)
    assert blueprint.grid.world_size == world_size
    return logs


def faults(*args, **kwargs):
    """What is wrong, in words; the same ranks without the fault must fit."""
    return compare_calls(rehearsed(*args, **kwargs))[1]


PIPELINE = tiny_config(**{PP: 4, BATCH: 24})
"""Four stages of one layer, twelve micro batches of two."""

TENSOR = tiny_config(**{TP: 2, PP: 2, BATCH: 8})
"""Two stages of two ranks (dp 2 on 8 ranks)."""


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (8, {TP: 2, PP: 2, BATCH: 16}),
        (8, {TP: 2, PP: 2, SP: True, ZERO: 1, BF16: True, BATCH: 16}),
        (4, {PP: 4, SCHEDULE: "zb-h1", BATCH: 24}),
        (4, {PP: 2, "parallel__num_layers_per_virtual_pipeline_stage": 1, ZERO: 1, BATCH: 16,
             "parallel__overlap_param_gather": True, "precision__fp16": True}),
        (2, {PP: 2, BATCH: 12, "parallel__recompute_granularity": "full",
             "parallel__recompute_method": "uniform", "parallel__recompute_num_layers": 1,
             "data__reset_attention_mask": True, "data__reset_position_ids": True}),
    ],
    ids=["tp, pp, dp", "tp, pp, dp, sharded, bf16", "zb-h1", "interleaved, sharded, fp16",
         "recomputed, documents apart"],
)  # fmt: skip
def test_all_ranks_of_a_sound_run_fit_together(world_size, changes):
    logs = rehearsed(tiny_config(**changes), world_size)
    found, wrong = compare_calls(logs)
    assert wrong == []
    assert found.ranks == world_size
    assert found.messages == sum(c.op == "send" for t in logs for c in t.calls) > 0


@pytest.mark.ci
def test_both_ends_of_a_tied_table_have_the_same_owner_whatever_their_stages_hold():
    """Adafactor's tables are one replica's, and at ZeRO 3 each layer is dealt out by itself."""
    config = tiny_config(
        optim__optimizer="adafactor", optim__adafactor_scale_parameter=True,
        **{TP: 2, PP: 2, SP: True, ZERO: 3, BATCH: 8},
    )  # fmt: skip
    assert compare_calls(rehearsed(config, 8))[1] == []


def test_a_rehearsed_rank_makes_the_calls_of_a_real_one():
    changes = {TP: 2, PP: 2, SP: True}
    real = spawn(traffic, 4, changes)
    config = tiny_config(train__micro_batch_size=2, **changes, **{BATCH: 2})
    for rank, (seen, _) in enumerate(real):
        calls = rehearse_rank(config, draw(config, 4), rank, FORMS).log.calls
        training = [c for c in calls if c.place.startswith("training") and c.op != "receive"]
        assert Counter((c.op, c.payload) for c in training) == seen


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_rehearsed_rank_allocates_what_a_real_one_does(dtype):
    changes = {BF16: True} if dtype == "bf16" else {}
    config = tiny_config(
        model__hidden_size=64, model__seq_length=128, model__vocab_size=256,
        train__micro_batch_size=1, **changes, **{BATCH: 3},
    )  # fmt: skip
    blueprint = draw(config, 1)
    batches = make_batches(config, blueprint, 0, 0)
    real = Footprint("cpu")
    with real:
        run = assemble(config, blueprint, context(blueprint, 0))
        real.peak = real.now
        train_step(run, batches, lr=1e-4, weight_decay=0.01)
    memory = rehearse_rank(config, blueprint, 0, FORMS).memory
    assert memory is not None
    assert memory.peak == pytest.approx(real.peak, rel=0.02)


def test_one_rank_per_kind_stands_for_every_stage_and_every_end():
    grid = draw(tiny_config(**{TP: 2, PP: 2, BATCH: 16}), 16).grid
    places = {grid.coords(rank) for rank in one_of_each(grid)}
    assert {(at.pp, at.tp, at.dp) for at in places} == {
        (pp, *ends) for pp in range(2) for ends in ((0, 0), (1, 0), (0, 3))
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bytes_follow_a_storage_that_is_emptied_and_filled_again(device):
    counted = Footprint(device)
    with counted:
        whole = torch.zeros(100, device=device)
        part = whole[3:5]
        whole.untyped_storage().resize_(0)
        assert counted.now == 0
        other = torch.zeros(50, device=device)
        whole.untyped_storage().resize_(400)
        assert (counted.now, counted.peak) == (600, 600)
        del whole, part
        assert counted.now == other.nbytes
    torch.zeros(3).untyped_storage().resize_(0)  # which nobody counts any more
    assert counted.peak == 600


class Edited(Blueprint):
    """A blueprint whose lists of one pp rank were changed after the check."""

    __slots__ = ()

    def actions(self, num_microbatches):
        rows = list(Blueprint.actions(self, num_microbatches))
        rows[EDIT["pp"]] = tuple(EDIT["edit"](list(rows[EDIT["pp"]])))
        return tuple(rows)


EDIT: dict = {}


def edited(edit):
    """A tamper that changes this rank's list of actions."""

    def tamper(actor):
        EDIT.update(pp=actor.run.ctx.pp.rank, edit=edit)
        fields = dataclasses.fields(Blueprint)
        actor.run.blueprint = Edited(
            **{f.name: getattr(actor.run.blueprint, f.name) for f in fields}
        )

    return tamper


def late(action, after):
    """The list with a message put off until after another one."""
    moved, goal = Action.parse(action), Action.parse(after)

    def edit(row):
        kept = [group for group in row if group != (moved,)]
        assert len(kept) == len(row) - 1, "the message stands alone"
        at = next(n for n, group in enumerate(kept) if goal in group)
        return [*kept[: at + 1], (moved,), *kept[at + 1 :]]

    return edited(edit)


def swapped(one, other):
    """The list with two of its actions in each other's place, groups kept."""
    one, other = Action.parse(one), Action.parse(other)
    places = {one: other, other: one}
    return edited(lambda row: [tuple(places.get(a, a) for a in group) for group in row])


def without(action):
    """The list without an action."""
    gone = Action.parse(action)
    rows = lambda row: [tuple(a for a in group if a != gone) for group in row]  # noqa: E731
    return edited(lambda row: [group for group in rows(row) if group])


def test_two_sends_in_the_other_order_which_a_cluster_would_take_silently_are_named():
    (wrong,) = faults(PIPELINE, 4, on=0, tamper=late("0SEND_F0", after="0SEND_F1"))
    assert wrong.startswith("message 1 from rank 0 to rank 1 does not fit")
    assert "activation into stage 1, micro batch 1" in wrong.split("rank 0,")[1]
    assert "activation into stage 1, micro batch 0" in wrong.split("rank 1,")[1]
    assert "0SEND_F1" in wrong and "1RECV_F0" in wrong


def test_two_swapped_computations_are_named():
    (wrong,) = faults(PIPELINE, 4, on=2, tamper=swapped("2F0", "2F2"))
    assert wrong.startswith("rank 2 breaks off") and "(2F2)" in wrong
    assert "the activation into stage 2, micro batch 2 was never received" in wrong


def test_a_missing_receive_is_named():
    wrong = faults(PIPELINE, 4, on=3, tamper=without("3RECV_F5"))
    assert wrong[0].startswith("rank 3 breaks off") and "(3F5)" in wrong[0]
    assert "the activation into stage 3, micro batch 5 was never received" in wrong[0]


def test_a_missing_last_send_is_named():
    (wrong,) = faults(PIPELINE, 4, on=1, tamper=without("1SEND_B11"))
    assert wrong.startswith("rank 1 breaks off") and "after its list" in wrong
    assert "the gradient into stage 0, micro batch 11 was never sent" in wrong


def test_a_wrong_sequence_length_on_one_stage_is_named_with_both_shapes():
    shorter = tiny_config(model__seq_length=8, **{PP: 4, BATCH: 24})
    wrong = faults(PIPELINE, 4, on=1, changed=shorter)
    (line,) = [line for line in wrong if "from rank 0 to rank 1" in line]
    assert "[16, 2, 32]" in line.split("rank 0,")[1].split("rank 1,")[0]
    assert "[8, 2, 32]" in line.split("rank 1,")[1]
    assert "0SEND_F0" in line and "1RECV_F0" in line


def test_a_wrong_hidden_size_on_one_rank_is_named_with_both_shapes():
    wider = tiny_config(model__hidden_size=64, **{TP: 2, PP: 2, BATCH: 8})
    wrong = faults(TENSOR, 4, on=1, changed=wider)
    (line,) = [line for line in wrong if "over tp of ranks 0, 1" in line]
    assert "[16, 2, 32]" in line and "[16, 2, 64]" in line and "layers/" in line


def test_another_number_format_on_one_rank_is_named():
    other = tiny_config(precision__bf16=True, **{TP: 2, PP: 2, BATCH: 8})
    wrong = faults(TENSOR, 4, on=1, changed=other)
    assert any("float32" in line and "bfloat16" in line and "over tp" in line for line in wrong)


def test_a_skipped_tensor_parallel_sum_is_named_with_the_rank_and_the_layer():
    def skip(actor):
        (stage,) = actor.run.pipeline.stages.values()
        down = stage.module.blocks["3"].mlp.down
        alone = dataclasses.replace(down.context.ctx, tp=Axis("tp"))
        down.context = dataclasses.replace(down.context, ctx=alone)

    wrong = faults(TENSOR, 4, on=3, tamper=skip)
    line = next(line for line in wrong if "over tp of ranks 2, 3" in line)
    assert "rank 3" in line and "1F0" in line and "layers/product.py" in line


def test_a_sum_at_the_end_that_one_rank_skips_is_named():
    def skip(actor):
        for local in actor.run.parameters:
            object.__setattr__(local, "tied_across_stages", False)

    (line,) = faults(TENSOR, 4, on=2, tamper=skip)
    assert line.startswith("rank 2 skips collective 1 over tied of ranks 0, 2")
    assert "engines/zero.py" in line and "[32, 32]" in line


def test_buckets_reduced_in_another_order_on_one_rank_are_named():
    config = tiny_config(parallel__ddp_bucket_size=2000, **{BATCH: 8})

    def reverse(actor):
        """The bucket that is full first waits for the end, as if another were."""
        first, arm = actor.run.parameters[-1].parameter, actor.run.pipeline.begin_last_backward
        actor.run.pipeline.begin_last_backward = lambda stage, pending_wgrads: arm(
            stage, [first, first]
        )

    assert faults(config, 2) == []
    (line,) = faults(config, 2, on=1, tamper=reverse)
    assert line.startswith("ranks 0 and 1 disagree on collective 1 over dp of ranks 0, 1")
    assert "all-reduce" in line and "action" in line


def test_two_groups_in_another_order_are_a_deadlock_with_the_ranks_that_wait():
    """Each group's own calls are in order: only who waits for whom shows it."""

    def tied_first(actor):
        run, reached = actor.run, actor.run.pipeline.reached
        twins = [local for local in run.parameters if local.tied_across_stages]

        def early(position, group):
            reached(position, group)
            while position == 1 and twins:
                local = twins.pop()
                gradients = named(run.engine.gradients(owned=False))
                all_reduce(gradients[local.spec.name], run.ctx.tied)
                object.__setattr__(local, "tied_across_stages", False)

        actor.run.pipeline.reached = early

    (line,) = faults(tiny_config(**{PP: 2, BATCH: 8}), 2, on=0, tamper=tied_first)
    assert line.startswith("deadlock: these calls wait for each other")
    assert "(0SEND_F0): all-reduce" in line and "over tied of ranks 0, 1" in line
    assert "(1RECV_F0): receive" in line.split("rank 1,")[1]


def test_a_wrong_partner_is_named():
    def elsewhere(actor):
        actor.run.pipeline.mail.placement = (0, 1, 3, 2)

    wrong = faults(PIPELINE, 4, on=1, tamper=elsewhere)
    assert any("rank 1 sends rank 3 a message that is never received" in line for line in wrong)
    assert any("rank 2 waits for a message that rank 1 never sends" in line for line in wrong)


def test_what_does_not_fit_ends_with_exit_code_6_and_a_count():
    logs = rehearsed(PIPELINE, 4, on=2, tamper=without("2RECV_F3"))
    with pytest.raises(DistributedError, match="would not fit together") as caught:
        require_agreement(logs)
    assert caught.value.exit_code == 6
    assert "rank 2 breaks off" in str(caught.value)
