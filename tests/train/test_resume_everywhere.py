"""A run interrupted again and again, at other layouts and batch sizes, reads every sample once."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from megatron_lite.data.loader import Loader
from tests.support.spawn import spawn
from tests.train.runs import alone, argv, curve, on_ranks, run_main, steps

LEGS = {
    "batches": [
        (1, "--global-batch-size 4 --micro-batch-size 2", 2),
        (2, "--global-batch-size 6 --micro-batch-size 1", 2),
        (2, "--global-batch-size 2 --micro-batch-size 2 --tensor-model-parallel-size 2", 3),
        (1, "--global-batch-size 5 --micro-batch-size 5", 1),
    ],
    "ramp-up": [
        (1, "--rampup-batch-size 2 2 8 --global-batch-size 6 --micro-batch-size 1", 2),
        (2, "--rampup-batch-size 2 2 8 --global-batch-size 6 --micro-batch-size 1", 2),
        (2, "--rampup-batch-size 2 2 8 --global-batch-size 6 --micro-batch-size 2 "
            "--pipeline-model-parallel-size 2", 3),
    ],
}  # fmt: skip
"""Name -> (ranks, flags, steps) of one call of the tool after the other in one run folder."""


def recorded(rank: int, ranks: int, words: list[str]) -> tuple[str, dict[int, list[int]]]:
    """What went wrong, and the samples this rank read, by the first sample of their step."""
    seen: dict[int, list[int]] = {}
    read = Loader.next_batches

    def record(self: Loader, start: int, *asked: int) -> list:
        batches = read(self, start, *asked)
        seen[start] = [int(n) for batch in batches for n in batch.sample_numbers]
        return batches

    Loader.next_batches = record  # type: ignore[method-assign]
    try:
        done = run_main(*words)
    finally:
        Loader.next_batches = read  # type: ignore[method-assign]
    return ("" if done.rc == 0 else done.err), seen


@pytest.mark.parametrize("legs", LEGS)
def test_every_sample_is_read_once_whatever_changes(
    legs: str, data: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    constant = ["--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--train-iters", "12"]
    words = [*data, *constant, "--save", str(folder), "--load", str(folder)]
    by_step: dict[int, set[int]] = defaultdict(set)
    done, expected_sizes = 0, []
    for ranks, flags, count in LEGS[legs]:
        done += count
        asked = argv(*words, *flags.split(), "--exit-interval", str(done))
        for problem, seen in spawn(recorded, ranks, asked, join=ranks == 1):
            assert not problem, problem
            for start, numbers in seen.items():
                by_step[start] |= set(numbers)
        expected_sizes.append(len(by_step))
    assert expected_sizes[-1] == done, "a step was left out or made twice"
    position = 0
    for start in sorted(by_step):
        assert start == position
        assert by_step[start] == set(range(start, start + len(by_step[start])))
        position += len(by_step[start])
    assert steps(folder)[-1].samples == position
    if legs == "ramp-up":  # the sizes are those of a run that was never interrupted
        straight = tmp_path / "straight"
        flags = LEGS[legs][0][1].split()
        exits = ["--save", str(straight), "--exit-interval", str(done)]
        assert alone(*data, *constant, *flags, *exits).rc == 0
        sizes = [r.global_batch_size for r in steps(straight)]
        assert [r.global_batch_size for r in steps(folder)] == sizes and len(set(sizes)) > 1


BIT_EXACT = {
    "dropout": (1, "--hidden-dropout 0.1 --attention-dropout 0.1"),
    "bf16-dropout": (1, "--bf16 --hidden-dropout 0.1"),
    "fp16": (1, "--fp16 --initial-loss-scale 1e6 --hysteresis 2 --loss-scale-window 2"),
    "accumulation": (1, "--global-batch-size 3 --micro-batch-size 1"),
    "ramp-up": (1, "--rampup-batch-size 1 1 9 --global-batch-size 3 --micro-batch-size 1"),
    "sgd": (1, "--optimizer sgd"),
    "recompute": (1, "--recompute-granularity full --recompute-method uniform "
                     "--recompute-num-layers 1 --hidden-dropout 0.1"),
    "async": (1, "--async-save --bf16"),
    "zero": (2, "--micro-batch-size 1 --use-distributed-optimizer --bf16"),
    "zero-async": (2, "--micro-batch-size 1 --use-distributed-optimizer --async-save"),
    "zero2": (2, "--micro-batch-size 1 --zero-stage 2 --bf16"),
    "zero3": (2, "--micro-batch-size 1 --zero-stage 3 --hidden-dropout 0.1"),
    "sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel --hidden-dropout 0.1"),
    "zb-h1": (2, "--pipeline-model-parallel-size 2 --pipeline-schedule zb-h1 --bf16"),
    "zb-v": (2, "--pipeline-model-parallel-size 2 --pipeline-schedule zb-v --num-layers 4"),
    "interleaved": (2, "--pipeline-model-parallel-size 2 --num-layers 4 "
                       "--num-virtual-stages-per-pipeline-rank 2"),
}  # fmt: skip
SLOW = {
    "zero3-bf16": (2, "--micro-batch-size 1 --zero-stage 3 --bf16"),
    "zero3-fp16": (2, "--micro-batch-size 1 --zero-stage 3 --fp16 --initial-loss-scale 1e6 "
                      "--hysteresis 2 --loss-scale-window 2"),
    "zero3-async": (2, "--micro-batch-size 1 --zero-stage 3 --async-save"),
    "zero3-pp2": (4, "--micro-batch-size 1 --zero-stage 3 --pipeline-model-parallel-size 2"),
    "zero3-muon": (4, "--micro-batch-size 1 --zero-stage 3 --tensor-model-parallel-size 2 "
                      "--optimizer muon"),
    "zero2-recompute": (2, "--micro-batch-size 1 --zero-stage 2 --recompute-granularity full "
                           "--recompute-method uniform --recompute-num-layers 1"),
}  # fmt: skip
AFTER = {1: (1, 2, 3, 5), 2: (3,), 4: (3,)}
"""Ranks -> the steps after which a run of six is taken up again."""


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.ci) for name in BIT_EXACT),
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_taken_up_after_any_step_a_run_ends_as_if_never_stopped(
    name: str, data: list[str], tmp_path: Path
) -> None:
    ranks, flags = (BIT_EXACT | SLOW)[name]
    words = [*data, "--train-iters", "6", "--save-interval", "1", *flags.split()]
    once = tmp_path / "once"
    straight = on_ranks(ranks, *words, "--save", str(once))
    assert straight.rc == 0, straight.err
    for step in AFTER[ranks]:
        again = tmp_path / f"after {step}"
        load = ["--load", str(once), "--ckpt-step", str(step), "--save", str(again)]
        resumed = on_ranks(ranks, *words, *load)
        assert resumed.rc == 0, resumed.err
        assert curve(steps(again)) == curve(steps(once)[step:])
        assert resumed.state_hash == straight.state_hash


@pytest.mark.parametrize(
    ("stages", "more"),
    [
        pytest.param((0, 3, 1, 2, 3), "--hidden-dropout 0.1", marks=pytest.mark.ci),
        pytest.param((3, 0, 2, 1, 3), "--bf16", marks=pytest.mark.slow),
        pytest.param((3, 2, 0, 3, 1), "--bf16 --optimizer muon", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_changes_its_stage_of_zero_ends_as_if_it_had_not(
    stages: tuple[int, ...], more: str, data: list[str], tmp_path: Path
) -> None:
    """Two ranks and one micro batch: every sum has two terms, so that no order is another.

    But that of the gradient norm, which nothing depends on without clipping.
    """
    words = [*data, "--train-iters", str(len(stages)), "--micro-batch-size", "2", *more.split()]
    words += ["--clip-grad", "0"]
    straight = on_ranks(2, *words, "--save", str(tmp_path / "once"))
    assert straight.rc == 0, straight.err
    folder = str(tmp_path / "run")
    for step, stage in enumerate(stages, start=1):
        leg = ["--zero-stage", str(stage), "--exit-interval", str(step)]
        done = on_ranks(2, *words, *leg, "--save", folder, "--load", folder)
        assert done.rc == 0, done.err
    losses = [[r.loss for r in steps(tmp_path / name)] for name in ("once", "run")]
    assert losses[0] == losses[1] and len(losses[0]) == len(stages)
    assert done.state_hash == straight.state_hash
