"""The Blueprint as a whole: the 175B run, its plan in words, and what cannot be drawn up."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_lite.blueprint.draw_up import Blueprint, draw_up
from megatron_lite.blueprint.grid import RankGrid
from megatron_lite.blueprint.plan import describe
from megatron_lite.blueprint.schedules.actions import Op
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.rules.table import size_problems
from megatron_lite.config.sections.model import ModelConfig
from tests.blueprint.configs import config, users_run
from tests.support.axes import CHUNKS, PP, SCHEDULE, TP

TINY = ModelConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, seq_length=16, vocab_size=61
)


@pytest.fixture(scope="module")
def users() -> Blueprint:
    return draw_up(users_run(), 64)


def test_users_blueprint_has_the_published_numbers(users: Blueprint) -> None:
    assert users.grid == RankGrid(tp=8, pp=8)
    assert users.dp == 1
    assert users.padded_vocab_size == 51200
    assert users.num_parameters == 174_615_846_912
    assert users.microbatches(1536) == users.microbatches() == 1536
    assert [len(stage.layers) for stage in users.stages] == [12] * 8
    assert f"{users.flops_per_token_full:.4e}" == "1.0764e+12"
    assert f"{users.flops_per_token_causal:.4e}" == "1.0619e+12"
    assert users.notes == ()


def test_each_rank_runs_its_stage_once_per_micro_batch(users: Blueprint) -> None:
    lowered = users.actions(16)
    assert len(lowered) == 8
    for rank, row in enumerate(lowered):
        computes = [a for group in row for a in group if a.op in (Op.F, Op.B)]
        assert len(computes) == 32
        assert {a.stage for a in computes} == {rank} == {s.index for s in users.stages_of(rank)}


def test_actions_are_drawn_up_once_per_number_of_micro_batches(users: Blueprint) -> None:
    assert users.actions(4) is users.actions(4)
    assert users.forward_actions(4) is users.forward_actions(4)


def test_evaluation_never_reduces(users: Blueprint) -> None:
    ops = {a.op for row in users.forward_actions(3) for group in row for a in group}
    assert ops == {Op.F, Op.SEND_F, Op.RECV_F}


def test_one_process_is_a_grid_and_a_pipeline_too() -> None:
    blueprint = draw_up(config(TINY, train__global_batch_size=2), 1)
    assert blueprint.grid.world_size == 1
    ((*_, before_last, last),) = blueprint.actions(2)
    assert (str(before_last[0]), str(last[0])) == ("0REDUCE_GRAD1", "0B1")
    assert blueprint.held(0).parameters == blueprint.num_parameters


def test_ranks_left_over_are_replicas() -> None:
    tp2 = config(TINY, parallel__tensor_model_parallel_size=2, train__global_batch_size=8)
    assert draw_up(tp2, 8).grid == RankGrid(tp=2, dp=4)


def test_the_other_numbering_is_megatrons_flag() -> None:
    assert draw_up(users_run(parallel__use_tp_pp_dp_mapping=True), 64).grid.order == "tp-cp-pp-dp"


def test_unknown_vocabulary_is_gpt2s_with_a_note() -> None:
    model = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, seq_length=8)
    blueprint = draw_up(config(model), 1)
    assert (blueprint.vocab_size, blueprint.padded_vocab_size) == (50257, 50304)
    assert "50,257 is assumed" in blueprint.notes[0]


def test_length_in_iterations_gives_samples_and_the_other_way_round() -> None:
    ramp = {"train__rampup_batch_size": [16, 16, 5859375]}
    by_iterations = draw_up(users_run(train__train_iters=19802, **ramp), 64)
    assert by_iterations.train_samples == 5859424
    by_samples = draw_up(
        users_run(train__train_iters=None, train__train_samples=5859424, **ramp), 64
    )
    assert by_samples.train_iters == 19802
    # the public run: 300 B tokens; the last partial batch is left out
    whole = draw_up(users_run(train__train_iters=None, train__train_samples=146484375, **ramp), 64)
    assert whole.train_iters == 19802 + (146484375 - 5859424) // 1536


def test_no_length_is_none() -> None:
    blueprint = draw_up(users_run(train__train_iters=None), 64)
    assert (blueprint.train_iters, blueprint.train_samples) == (None, None)


@pytest.mark.parametrize(
    ("changes", "world_size", "says"),
    [
        ({}, 60, "= 64 does not divide 60 ranks; start 64 ranks"),
        ({"train__global_batch_size": 3}, 128, "3 is not divisible by .* 1 x .* 2 = 2"),
        ({PP: 7}, 56, "96 cannot be dealt to .* 7 stages"),
        ({TP: 5}, 40, "96 cannot be split over .* 5"),
        ({SCHEDULE: "interleaved"}, 64, "interleaved needs 2 or more stages"),
        (
            {CHUNKS: 5},
            64,
            "8 x 5 stages per rank; use 80",
        ),
        ({"train__train_samples": 9}, 64, "exclude each other; give one"),
        ({"train__train_samples": 9, "train__train_iters": None}, 64, "less than one batch"),
        ({"model__seq_length": 0}, 64, "--seq-length is required, at least 1"),
        ({"model__num_attention_heads": 95}, 64, "12288 does not divide into .*heads 95"),
    ],
)
def test_what_does_not_come_out_even_is_refused(
    changes: dict[str, Any], world_size: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        draw_up(users_run(**changes), world_size)


def test_all_wrong_sizes_are_reported_together_as_the_rules_say_them() -> None:
    with pytest.raises(ConfigError, match="(?s)4 problems .*--num-layers .*--seq-length ") as found:
        draw_up(config(ModelConfig()), 1)
    assert all(problem in str(found.value) for problem in size_problems(config(ModelConfig()), 1))


def test_the_plan_states_what_a_dry_run_promises(users: Blueprint) -> None:
    plan = " ".join(describe(users).split())
    for promise in (
        "plan for 64 ranks",
        "tp 8 x cp 1 x dp 1 x pp 8",
        "vocabulary 50,257 padded to 51,200",
        "174,615,846,912 in all",
        "2,822,731,776 per rank of pp 0: stage 0 with embedding, layers 0-11",
        "2,797,590,528 per rank of pp 7: stage 7 with layers 84-95, head",
        "1,536 micro batches x 1 x dp 1; 3,145,728 tokens per step",
        "500,000 iterations = 768,000,000 samples = 1,572,864,000,000 tokens",
        "1f1b, bubble 0.45% of the step",
        "kept at once per pp rank: 8 7 6 5 4 3 2 1",
        "3.3862e+18 per step, 1.0764e+12 per token: full",
        "3.3406e+18 per step, 1.0619e+12 per token: causal",
    ):
        assert promise in plan


def test_the_plan_shows_the_ramp_and_the_notes() -> None:
    ramp = users_run(train__rampup_batch_size=[16, 16, 5859375], model__vocab_size=None)
    plan = " ".join(describe(draw_up(ramp, 64)).split())
    assert "ramp: 16 from iteration 0 (sample 0), 32 from iteration 3,855 (sample 61,680)" in plan
    assert "91 sizes between" in plan
    assert "1,536 from iteration 19,802 (sample 5,859,424)" in plan
    assert "note vocabulary size not known" in plan
    steps = users_run(train__step_batch_size_schedule="0:768 1M:1536", train__train_iters=None)
    plan = " ".join(describe(draw_up(steps, 64)).split())
    assert "ramp: 768 from iteration 0 (sample 0), 1,536 from iteration 1 (sample 768)" in plan
    assert "length not known" in plan


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (1, "shared masters and optimizer state: 1/8 on each rank of dp (--zero-stage 1)"),
        (3, "optimizer state, gradients, weights: 1/8 on each rank of dp (--zero-stage 3)"),
    ],
)
def test_what_replicas_share_is_said(stage: int, said: str) -> None:
    def text(world: int, stage: int) -> str:
        return " ".join(describe(draw_up(config(model=TINY), world), zero_stage=stage).split())

    assert said in text(8, stage)
    assert "zero-stage" not in text(1, stage) + text(8, 0)
