"""Schedules, chunks and layers per stage as asked for; what does not come out is refused."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.pipeline import Pipeline, parse_layout, pipeline
from megatron_lite.config.rules.table import problems
from megatron_lite.config.sections.parallel import ParallelConfig


def asked(num_layers: int, pp: int, **fields: Any) -> Pipeline:
    return pipeline(num_layers, ParallelConfig(pipeline_model_parallel_size=pp, **fields))


@pytest.mark.parametrize(
    ("num_layers", "pp", "fields", "schedule", "layers"),
    [
        (8, 1, {}, "1f1b", (8,)),
        (8, 4, {}, "1f1b", (2, 2, 2, 2)),
        (8, 4, {"pipeline_schedule": "gpipe"}, "gpipe", (2, 2, 2, 2)),
        (8, 2, {"num_virtual_stages_per_pipeline_rank": 2}, "interleaved", (2, 2, 2, 2)),
        (8, 2, {"num_layers_per_virtual_pipeline_stage": 1}, "interleaved", (1,) * 8),
        (8, 2, {"num_layers_per_virtual_pipeline_stage": 4}, "1f1b", (4, 4)),  # one chunk: plain
        (8, 2, {"pipeline_schedule": "zb-v"}, "zb-v", (2, 2, 2, 2)),
        (9, 3, {"decoder_first_pipeline_num_layers": 1}, "1f1b", (1, 4, 4)),
        (9, 3, {"decoder_last_pipeline_num_layers": 3}, "1f1b", (3, 3, 3)),
        (
            10, 4,
            {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 3},
            "1f1b", (1, 3, 3, 3),
        ),
        (
            12, 3,
            {"decoder_first_pipeline_num_layers": 2, "decoder_last_pipeline_num_layers": 4,
             "num_virtual_stages_per_pipeline_rank": 2},
            "interleaved", (1, 3, 2, 1, 3, 2),
        ),
        (7, 4, {"account_for_embedding_in_pipeline_split": True}, "1f1b", (1, 2, 2, 2)),
        (7, 4, {"account_for_loss_in_pipeline_split": True}, "1f1b", (2, 2, 2, 1)),
        (
            6, 2,
            {"account_for_embedding_in_pipeline_split": True, "pipeline_schedule": "zb-v",
             "account_for_loss_in_pipeline_split": True},
            "zb-v", (1, 2, 2, 1),
        ),
        (
            6, 2,
            {"account_for_embedding_in_pipeline_split": True,
             "num_layers_per_virtual_pipeline_stage": 1,
             "account_for_loss_in_pipeline_split": True},
            "interleaved", (0, 1, 1, 1, 1, 1, 1, 0),
        ),
        (61, 32, {"pipeline_model_parallel_layout": "Et|(tt|)*30L"}, "1f1b", (1, *(2,) * 30, 0)),
        (4, 2, {"pipeline_model_parallel_layout": "Et|t|t|tL"}, "interleaved", (1, 1, 1, 1)),
    ],
)  # fmt: skip
def test_what_is_asked_for_comes_out(
    num_layers: int, pp: int, fields: dict[str, Any], schedule: str, layers: tuple[int, ...]
) -> None:
    found = asked(num_layers, pp, **fields)
    assert found == Pipeline(schedule, len(layers) // pp, layers)


VIRTUAL = "--num-virtual-stages-per-pipeline-rank"


@pytest.mark.parametrize(
    ("num_layers", "pp", "fields", "says"),
    [
        (8, 3, {}, "--num-layers 8 cannot be dealt to .* 3 stages; choose pp from 1, 2, 4, 8, or 6"),
        (126, 16, {}, "112 or 128 layers, or count .*-embedding-in.* and .*-loss-in-pipeline-split$"),
        (15, 8, {"num_virtual_stages_per_pipeline_rank": 2}, "count .*-embedding-in.* or .*-loss-in.*split$"),
        (12, 8, {}, "8 or 16 layers$"),
        (9, 2, {"num_virtual_stages_per_pipeline_rank": 2}, "2 x 2 stages per rank; use 8 or 12"),
        (8, 1, {"num_virtual_stages_per_pipeline_rank": 2}, "virtual pipeline stages need"),
        (8, 1, {"pipeline_schedule": "zb-v"}, "--pipeline-schedule zb-v needs .* at least 2"),
        (8, 1, {"pipeline_schedule": "interleaved"}, "virtual pipeline stages need"),
        (8, 2, {"pipeline_schedule": "interleaved"}, f"interleaved needs 2 or more.*{VIRTUAL} 2"),
        (
            8, 2,
            {"pipeline_schedule": "1f1b", "num_virtual_stages_per_pipeline_rank": 2},
            "1f1b has one stage per rank, not 2; use interleaved or zb-v",
        ),
        (
            12, 2,
            {"pipeline_schedule": "zb-h1", "num_layers_per_virtual_pipeline_stage": 2},
            "zb-h1 has one stage per rank, not 3; use interleaved, or leave",
        ),
        (
            12, 2,
            {"pipeline_schedule": "zb-v", "num_virtual_stages_per_pipeline_rank": 3},
            "zb-v has 2 stages per rank, not 3",
        ),
        (
            8, 2,
            {"num_layers_per_virtual_pipeline_stage": 2, "num_virtual_stages_per_pipeline_rank": 2},
            "say the same thing; give one",
        ),
        (8, 2, {"num_layers_per_virtual_pipeline_stage": 3}, "does not divide the 4 layers of a"),
        (
            8, 2,
            {"num_layers_per_virtual_pipeline_stage": 2, "decoder_first_pipeline_num_layers": 2},
            f"counts equal stages; with uneven ones use {VIRTUAL}",
        ),
        (8, 4, {"decoder_first_pipeline_num_layers": 3}, "leave 5 layers for 3 ranks"),
        (8, 4, {"decoder_first_pipeline_num_layers": 8}, "leave 0 layers for 3 ranks"),
        (8, 2, {"decoder_last_pipeline_num_layers": 9}, "leave -1 layers for 1 ranks"),
        (
            8, 1,
            {"decoder_last_pipeline_num_layers": 4, "decoder_first_pipeline_num_layers": 4},
            "need --pipeline-model-parallel-size of at least 2",
        ),
        (
            8, 2,
            {"decoder_first_pipeline_num_layers": 3, "num_virtual_stages_per_pipeline_rank": 2},
            "3, 5 layers per rank do not all divide",
        ),
        (
            8, 2,
            {"decoder_first_pipeline_num_layers": 3, "pipeline_schedule": "zb-v"},
            "zb-v puts both ends on the first rank; use --pipeline-model-parallel-layout",
        ),
        (
            8, 4,
            {"decoder_first_pipeline_num_layers": 2, "account_for_loss_in_pipeline_split": True},
            "each say how layers are dealt; use one way",
        ),
        (2, 4, {"account_for_loss_in_pipeline_split": True}, "2 . 1 for embedding and loss cannot"),
        (5, 2, {"pipeline_model_parallel_layout": "Et|t|tL"}, "has 3 stages, no multiple of .* 2"),
        (5, 3, {"pipeline_model_parallel_layout": "Et|t|tL"}, "has 3 layers .t., --num-layers is 5"),
        (2, 3, {"pipeline_model_parallel_layout": "Et||tL"}, "stage 1 of 3 would get 0"),
        (
            8, 2,
            {"pipeline_model_parallel_layout": "Et*4|t*4L",
             "num_virtual_stages_per_pipeline_rank": 2},
            f"says how many stages a rank has; leave {VIRTUAL} out",
        ),
    ],
)  # fmt: skip
def test_what_does_not_come_out_is_refused_with_the_way_out(
    num_layers: int, pp: int, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        asked(num_layers, pp, **fields)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("EttL", (2,)),
        ("E|t, t|L", (0, 2, 0)),
        ("Et*3|(tt|)*29,tL", (3, *(2,) * 29, 1)),
        ("E((t|)*2tt|)*2L", (1, 1, 2, 1, 1, 2, 0)),
        ("Et*0|tL", (0, 1)),
    ],
)
def test_layout_strings(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layout(text) == layers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must begin with its only E and end with its only L"),
        ("tEL", "must begin with its only E"),
        ("EtEL", "must begin with its only E"),
        ("EtLt", "end with its only L"),
        ("Et|mL", r"place 4: multi-token prediction \(m\) is not built"),
        ("Etx", "place 3: 'x'; it knows E, t, L"),
        ("E(t|L", r"place 6: a \( without its \)"),
        ("Et)L", r"place 3: a \) without its \("),
        ("Et*L", r"place 3: a \* without a number"),
        ("Et*123456L", r"place 3: a \* without a number of at most 5 digits"),
        ("E(t*9999)*9999L", "more than 10000 layers and borders"),
        ("E" + "t*9000" * 2 + "L", "more than 10000 layers and borders"),
        ("(" * 5000, r"more than 20 \( in each other"),
    ],
)
def test_a_wrong_layout_names_the_place(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_layout(text)


GOOD = (
    "--num-layers 8 --hidden-size 96 --num-attention-heads 12 --seq-length 64 --lr 1e-3 "
    "--mock-data --vocab-size 100 --train-iters 100 --pipeline-model-parallel-size 4"
)
INTERLEAVED = f"{GOOD} {VIRTUAL} 2"


@pytest.mark.parametrize(
    ("words", "world_size", "says"),
    [
        (f"{INTERLEAVED} --global-batch-size 8", 8, None),
        (f"{INTERLEAVED} --global-batch-size 4", 8, "is 2 micro batches .* 4: use 8, or 1f1b"),
        (INTERLEAVED, 4, "--global-batch-size 1 is 1 micro batches"),
        (
            f"{INTERLEAVED} --global-batch-size 32 --micro-batch-size 2 --rampup-batch-size 8 4 99",
            4,
            "--rampup-batch-size: increment 4 is 2 micro batches .*: use 8, or",
        ),
        (
            f"{INTERLEAVED} --step-batch-size-schedule '0:6 1M:8'",
            4,
            "--step-batch-size-schedule: 6 is 6 micro batches .* use 4 or 8",
        ),
        (f"{GOOD} --global-batch-size 3 --pipeline-schedule zb-v", 4, None),
        (f"{GOOD} --global-batch-size 3 --pipeline-schedule zb-h1", 4, None),
        (
            f"{GOOD} --pipeline-schedule zb-h1 --no-gradient-accumulation-fusion",
            4,
            "zb-h1 defers weight gradients",
        ),
    ],
)
def test_rules_of_schedules(words: str, world_size: int, says: str | None) -> None:
    found = problems(parse(shlex.split(words)).config, world_size)
    if says is None:
        assert found == []
    else:
        with pytest.raises(AssertionError, match=says):
            assert not found, found
