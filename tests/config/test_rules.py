"""Each rule names the flags, the numbers and what would work; all failures come together."""

from __future__ import annotations

import dataclasses
import shlex

import pytest

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.flags.settings import settings
from megatron_lite.config.rules.ranges import RANGES
from megatron_lite.config.rules.table import NOT_YET, NotYet, check_config, notices, problems
from megatron_lite.config.sections.run import RunConfig

GOOD = (
    "--num-layers 8 --hidden-size 96 --num-attention-heads 12 --seq-length 64 --lr 1e-3 "
    "--mock-data --vocab-size 100"
)
ITERS = f"{GOOD} --train-iters 100"


def found(words: str, world_size: int = 1) -> list[str]:
    return problems(parse(shlex.split(words)).config, world_size)


@pytest.mark.parametrize(
    "words, world_size",
    [
        ("", 1),
        ("--fp16", 1),
        ("--use-cpu --fp16", 4),
        ("--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --sequence-parallel", 16),
        ("--sequence-parallel", 2),
        ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 1),
        ("--rampup-batch-size 4 4 1000 --global-batch-size 32", 2),
        ("--step-batch-size-schedule '0:4 1K:8' --global-batch-size 8", 2),
        ("--step-batch-size-schedule 0:4,1K:8", 2),
        ("--group-query-attention --num-query-groups 4 --tensor-model-parallel-size 4", 4),
        ("--num-query-groups 12", 1),
        ("--kv-channels 16", 1),
        ("--lr-warmup-iters 99", 1),
        ("--lr-warmup-fraction 0.01 --lr-decay-iters 50", 1),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 10", 1),
        ("--weight-decay-incr-style cosine --start-weight-decay 0 --end-weight-decay 0.1", 1),
        ("--save c --save-interval 10", 1),
        ("--save c --exit-interval 10", 1),
        ("--load c --finetune", 1),
        ("--profile --profile-ranks 1", 2),
        ("--swiglu", 1),
        ("--s2-attention --attention-dropout 0", 1),
        ("--s2-attention --s2-group-size 64 --attention-dropout 0 --sequence-parallel", 1),
        ("--position-embedding-type rope", 1),
        ("--pipeline-schedule 1f1b --num-virtual-stages-per-pipeline-rank 1", 1),
    ],
)
def test_what_works_passes(words: str, world_size: int) -> None:
    check_config(parse(shlex.split(f"{ITERS} {words}")).config, world_size)


@pytest.mark.parametrize("only", ["--dry-run", "--rehearse", "--rehearse --all-ranks"])
def test_a_run_that_is_only_planned_or_rehearsed_needs_no_data(only: str) -> None:
    words = f"--preset gpt3-175b --lr 6e-5 --train-iters 5 {only}"
    check_config(parse(words.split()).config, 1)


BAD = [
    (
        "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 4",
        8,
        "--tensor-model-parallel-size 4 x --pipeline-model-parallel-size 4 x "
        "--context-parallel-size 1 = 16 does not divide 8 ranks; start 16 ranks, "
        "or use tp x pp 4x2, 2x4, 1x8, 4x1, 2x2, 1x4",
    ),
    (
        "--tensor-model-parallel-size 5",
        12,
        "= 5 does not divide 12 ranks; start 10 or 15 ranks, or use tp x pp 12x1, 6x2, 3x4",
    ),
    (
        "--tensor-model-parallel-size 8",
        8,
        "--num-attention-heads 12 cannot be split over --tensor-model-parallel-size 8; "
        "choose tp from 1, 2, 3, 4, 6, 12",
    ),
    (
        "--group-query-attention --num-query-groups 2 --tensor-model-parallel-size 4",
        4,
        "--num-query-groups 2 cannot be split over --tensor-model-parallel-size 4; "
        "choose tp from 1, 2",
    ),
    (
        "--ffn-hidden-size 9 --tensor-model-parallel-size 2",
        2,
        "--ffn-hidden-size 9 cannot be split over --tensor-model-parallel-size 2; choose tp from "
        "1, 3, 9",
    ),
    (
        "--swiglu --kv-channels 8 --num-query-groups 12 --ffn-hidden-size 0",
        1,
        "--ffn-hidden-size 0",
    ),
    ("--group-query-attention --num-query-groups 5", 1, "choose from 1, 2, 3, 4, 6, 12"),
    ("--group-query-attention", 1, "--group-query-attention needs --num-query-groups"),
    ("--num-query-groups 4", 1, "--num-query-groups 4 has no effect without --group-query"),
    ("--max-position-embeddings 32", 1, "--max-position-embeddings 32 is below --seq-length 64"),
    (
        "--pipeline-model-parallel-size 3",
        3,
        "--num-layers 8 cannot be dealt to --pipeline-model-parallel-size 3 stages; choose pp "
        "from 1, 2, 4, 8, or 6 or 9 layers",
    ),
    (
        "--tensor-model-parallel-size 3 --sequence-parallel",
        3,
        "--sequence-parallel cannot split --seq-length 64 over --tensor-model-parallel-size 3; "
        "use a length of 63 or 66",
    ),
    (
        "--global-batch-size 100 --micro-batch-size 4",
        2,
        "--global-batch-size 100 is not divisible by --micro-batch-size 4 x data-parallel size 2 "
        "= 8; the nearest that are: 96 or 104",
    ),
    (
        "--step-batch-size-schedule 0:4,1:8 --global-batch-size 8",
        1,
        "0 and 1 tokens are the same sample 0 of --seq-length",
    ),
    ("--rampup-batch-size 4 4", 1, "takes three numbers, START INCREMENT SAMPLES; got 2"),
    ("--rampup-batch-size 4 4 100", 1, "needs --global-batch-size, the size it climbs to"),
    ("--rampup-batch-size 0 4 100 --global-batch-size 8", 1, "start 0 and increment 4 must be"),
    ("--rampup-batch-size 16 4 100 --global-batch-size 8", 1, "starts above --global-batch-size 8"),
    (
        "--rampup-batch-size 4 5 100 --global-batch-size 16",
        1,
        "from 4 in steps of 5 never meets --global-batch-size 16; choose 14 or 19, or an "
        "increment from 1, 2, 3, 4, 6, 12",
    ),
    ("--rampup-batch-size 3 1 9 --global-batch-size 8", 2, "start 3 is not divisible by"),
    (
        "--rampup-batch-size 4 4 9 --global-batch-size 8 --step-batch-size-schedule 0:4,9:8",
        1,
        "--rampup-batch-size 4 4 9 and --step-batch-size-schedule exclude each other",
    ),
    (
        "--step-batch-size-schedule 0:4,9:8 --global-batch-size 16",
        1,
        "--step-batch-size-schedule ends at 8, but --global-batch-size is 16",
    ),
    ("--step-batch-size-schedule 0:3,9:8", 2, "--step-batch-size-schedule: 3 is not divisible"),
    ("--step-batch-size-schedule nine", 1, "'nine' is not tokens:size"),
    ("--fp16 --bf16", 1, "--fp16 and --bf16 exclude each other"),
    ("--min-loss-scale 8 --initial-loss-scale 4", 1, "--min-loss-scale 8 is above"),
    (
        "--apply-query-key-layer-scaling --no-attention-softmax-in-fp32",
        1,
        "--apply-query-key-layer-scaling needs --attention-softmax-in-fp32",
    ),
    ("--train-samples 9", 1, "--train-iters 100 and --train-samples 9 exclude each other"),
    ("--train-epochs 9", 1, "--train-iters 100 and --train-epochs 9 exclude each other"),
    ("--epoch-samples 9", 1, "--epoch-samples 9 says how long an epoch of --train-epochs is"),
    (
        "--train-samples 7 --global-batch-size 8",
        1,
        "--train-samples 7 is less than one batch of 8 samples; give at least 8",
    ),
    (
        "--lr-decay-samples 9",
        1,
        "--lr-decay-samples 9 does not go with --train-iters; use --lr-decay-i",
    ),
    ("--lr-warmup-samples 9", 1, "--lr-warmup-samples 9 does not go with --train-iters"),
    ("--min-lr 0.1", 1, "--min-lr 0.1 is above --lr 0.001"),
    ("--lr-warmup-init 0.1", 1, "--lr-warmup-init 0.1 is above --lr 0.001"),
    ("--lr-warmup-iters 100", 1, "--lr-warmup-iters 100 must be below the decay's 100 iters"),
    (
        "--lr-warmup-fraction 0.1 --lr-warmup-iters 5",
        1,
        "--lr-warmup-fraction 0.1 and --lr-warmup-i",
    ),
    ("--lr-warmup-fraction 1", 1, "--lr-warmup-fraction 1.0 must be at least 0 and below 1"),
    ("--lr-decay-style WSD", 1, "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
    (
        "--lr-decay-style WSD --lr-wsd-decay-iters 101",
        1,
        "is longer than the whole decay, 100 iters",
    ),
    ("--lr-wsd-decay-iters 5", 1, "--lr-wsd-decay-iters 5 needs --lr-decay-style WSD"),
    ("--lr-restarts 2", 1, "--lr-restarts 2 needs --lr-decay-style cosine; it is linear"),
    (
        "--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
        1,
        "--use-checkpoint-opt-param-scheduler exclude each other",
    ),
    ("--weight-decay-incr-style linear", 1, "linear needs --start-weight-decay"),
    ("--start-weight-decay 0.5", 1, "--start-weight-decay 0.5 needs --weight-decay-incr-style"),
    ("--adam-beta1 1", 1, "--adam-beta1 1.0 must be at least 0 and below 1"),
    ("--adam-eps 0", 1, "--adam-eps 0.0 must be above 0"),
    ("--hidden-dropout 1", 1, "--hidden-dropout 1.0 must be at least 0 and below 1"),
    ("--attention-dropout -0.1", 1, "--attention-dropout -0.1 must be at least 0"),
    ("--eval-interval 0", 1, "--eval-interval 0 must be at least 1"),
    ("--train-epochs 2000000", 1, "must be at least 1 and at most 1000000"),
    ("--profile --profile-ranks 0 1", 1, "--profile-ranks 1: there are ranks 0 to 0"),
    (
        "--profile --profile-step-end 3",
        1,
        "--profile-step-end 3 must be above --profile-step-start 10",
    ),
    ("--no-calculate-per-token-loss", 1, "--no-calculate-per-token-loss is not supported"),
    (
        "--recompute-granularity selective --recompute-modules mlp moe_act",
        1,
        "moe_act: no part of a block",
    ),
    ("--recompute-method block", 1, "need --recompute-granularity full; it is not given"),
    ("--recompute-activations --recompute-num-layers 1", 1, "full; it is selective"),
    ("--distribute-saved-activations", 1, "--tensor-model-parallel-size above 1 (it is 1)"),
    (
        "--distribute-saved-activations --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1 --tensor-model-parallel-size 3",
        3,
        "cannot cut --seq-length 64 in --tensor-model-parallel-size 3 slices; use a length of 63 or",
    ),
    ("--overlap-param-gather", 1, "--overlap-param-gather needs --zero-stage 1; add"),
    ("--dry-run --rehearse", 1, "--dry-run and --rehearse exclude each other; give one"),
    ("--all-ranks", 1, "--all-ranks says which ranks --rehearse takes; give both or neither"),
    ("--data-path a", 1, "got --data-path and --mock-data"),
    ("--split x", 1, "--split 'x'"),
    (
        "--save c --no-save-checkpoints --keep-last 2",
        1,
        "--keep-last needs checkpoints: leave out --no-save",
    ),
    ("--finetune", 1, "--finetune needs --load"),
    ("--ckpt-step 3", 1, "--ckpt-step needs --load"),
    ("--wandb-project p", 1, "--wandb-project p needs --wandb-exp-name"),
    (
        "--num-layers-per-virtual-pipeline-stage 3 --pipeline-model-parallel-size 2",
        2,
        "--num-layers-per-virtual-pipeline-stage 3 does not divide the 4 layers of a stage",
    ),
    ("--num-virtual-stages-per-pipeline-rank 2", 1, "virtual pipeline stages need --pipeline"),
]


def test_a_split_without_training_data_is_refused_where_the_split_counts() -> None:
    real = f"{ITERS.replace('--mock-data', '--data-path x')} --tokenizer-type NullTokenizer"
    (problem,) = found(f"{real} --split 0,1,0")
    assert "the training split is empty" in problem
    assert found(f"{ITERS} --split 0,1,0") == []
    (notice,) = notices(parse(f"{ITERS} --split 0,1,0".split()).config, 1)
    assert notice.startswith("--split 0,1,0: ignored, --mock-data's documents are dealt 1,1,1")


@pytest.mark.parametrize("words, world_size, message", BAD)
def test_what_cannot_work_is_named_with_the_way_out(
    words: str, world_size: int, message: str
) -> None:
    listed = found(f"{ITERS} {words}", world_size)
    assert any(message in problem for problem in listed), listed


@pytest.mark.parametrize(
    "words, message",
    [
        ("--train-iters 5", "--lr is required"),
        ("--train-iters 5", "--num-layers is required"),
        ("--train-iters 5", "exactly one source of data is needed, got none"),
        ("--lr 1", "how long to train is missing; give --train-iters, --train-samples or"),
        ("--lr 0", "--lr 0.0 must be above 0"),
        ("--data-path a --lr 1", "--tokenizer-type GPT2BPETokenizer needs --vocab-file"),
        ("--data-path a --tokenizer-type NullTokenizer", "NullTokenizer needs --vocab-size"),
        ("--data-path a --tokenizer-type TikTokenizer", "TikTokenizer needs --tokenizer-model"),
        ("--train-samples 9 --lr-warmup-iters 3", "--lr-warmup-iters 3 does not go with --train-s"),
        ("--train-samples 9 --lr-warmup-samples 9", "must be below the decay's 9 samples"),
        ("--train-samples 9 --lr-decay-style WSD", "WSD needs --lr-wsd-decay-samples"),
        ("--train-epochs 9 --lr-warmup-iters 3", "use --lr-warmup-samples or --lr-warmup-fraction"),
        ("--train-epochs 3 --epoch-samples 3 --lr-warmup-samples 9", "below the decay's 9 samples"),
        ("--train-epochs 9 --mock-data", "--train-epochs 9: --mock-data has no end"),
        ("--train-epochs 9 --data-path 1 a 2 b", "leave the weights out, or give --train-iters"),
        ("--hidden-size 100 --num-attention-heads 12", "choose heads from 1, 2, 4, 5, 10, 20, 25,"),
    ],
)
def test_what_is_missing_is_named(words: str, message: str) -> None:
    assert any(message in problem for problem in found(words))


NOT_BUILT = [
    "--context-parallel-size 2",
    "--overlap-param-gather",
    "--recompute-granularity selective",
    "--distribute-saved-activations",
]


@pytest.mark.parametrize("row", NOT_YET, ids=[row.flag for row in NOT_YET])
def test_what_is_not_built_is_refused_by_name(row: NotYet) -> None:
    words = next(w for w in NOT_BUILT if row.flag.startswith(w.split()[0]))
    assert f"{row.flag} is not built yet; {row.instead}" in found(f"{ITERS} {words}", 4)


def test_all_failures_are_reported_together_and_numbered() -> None:
    words = (
        "--num-layers 7 --hidden-size 96 --num-attention-heads 12 --seq-length 63 --fp16 --bf16 "
        "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 2 --sequence-parallel "
        "--global-batch-size 3 --micro-batch-size 2 --adam-beta2 1.5 --mock-data --min-lr 1 "
        "--vocab-size 9 --seed -1"
    )
    with pytest.raises(ConfigError) as caught:
        check_config(parse(words.split()).config, 16)
    heading, *listed = str(caught.value).splitlines()
    assert heading == "9 problems with this config on 16 ranks:"
    starts = [
        "--adam-beta2 1.5 must be",
        "--seed -1 must be",
        "--num-attention-heads 12 cannot be split over --tensor-model-parallel-size 8",
        "--num-layers 7 cannot be dealt to --pipeline-model-parallel-size 2",
        "--sequence-parallel cannot split --seq-length 63",
        "--global-batch-size 3 is not divisible",
        "--fp16 and --bf16",
        "how long to train is missing",
        "--lr is required",
    ]
    for start in starts:
        assert any(start in line for line in listed), start
    assert [line.split(".")[0].strip() for line in listed] == [str(n) for n in range(1, 10)]


def test_one_failure_stands_alone() -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(parse([*ITERS.split(), "--fp16", "--bf16"]).config, 1)
    assert str(caught.value) == "--fp16 and --bf16 exclude each other; give one"


def test_every_number_has_a_range_and_every_default_lies_in_it() -> None:
    numbers = {key for key, s in settings().items() if s.kind in (int, float) and not s.choices}
    assert set(RANGES) == numbers
    named = " ".join(problems(RunConfig(), 1))
    assert [s.flag for s in settings().values() if s.required] == [
        "--num-layers",
        "--hidden-size",
        "--num-attention-heads",
        "--seq-length",
    ]
    assert " must be " not in named


def test_a_config_made_in_code_is_checked_too() -> None:
    config = parse(ITERS.split()).config
    bad = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, clip_grad=float("nan"))
    )
    assert problems(bad, 1) == ["--clip-grad nan must be at least 0 and at most 1e+38"]


def test_no_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="--world-size: 0 ranks; at least 1 is needed"):
        check_config(parse(ITERS.split()).config, 0)


def test_what_changes_nothing_gives_a_notice() -> None:
    words = f"{ITERS} --sequence-parallel --use-distributed-optimizer"
    config = parse(words.split()).config
    assert notices(config, 1) == (
        "--sequence-parallel: nothing to split at tensor-parallel size 1; off",
        "--zero-stage 1: changes nothing at data-parallel size 1",
    )
    assert notices(config, 2) == (
        "--sequence-parallel: nothing to split at tensor-parallel size 1; off",
    )


def test_a_switch_that_nothing_fuses_gives_a_notice() -> None:
    words = f"{ITERS} --no-bias-dropout-fusion --no-load-rng"
    assert notices(parse(words.split()).config, 1) == (
        "--no-bias-dropout-fusion: changes nothing; bias, dropout and addition are separate in any "
        "case",
        "--no-load-rng: changes nothing; the random generator is counter-based: there is no RNG state",
    )
    assert notices(parse(f"{ITERS} --overlap-grad-reduce".split()).config, 1) == ()


def test_huge_sizes_are_refused_quickly() -> None:
    big = str(2**31 - 1)
    words = (
        f"{GOOD} --train-iters {big} --global-batch-size {big} --micro-batch-size 2 "
        f"--tensor-model-parallel-size {big} --pipeline-model-parallel-size {big}"
    )
    assert any("does not divide 8 ranks" in problem for problem in found(words, 8))
