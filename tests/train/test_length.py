"""A run ends where its flags say and reads what that takes, however the batch size changes on the way."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.checkpoint.progress import Progress
from megatron_lite.config.errors import DataError
from megatron_lite.data.loader import Loader
from tests.support.corpora import write_pair
from tests.train.runs import Outcome, alone, evaluations, steps

pytestmark = pytest.mark.ci

RAMP = ["--global-batch-size", "8", "--rampup-batch-size", "2", "2", "24", "--train-iters", "20"]


def token_file(folder: Path, name: str, documents: int) -> str:
    random = np.random.default_rng(documents)
    return write_pair(
        folder / name, ([*random.integers(0, 60, 17).tolist(), 60] for _ in range(documents))
    )


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a blend of two files, which holds no sample more than is asked for."""
    folder = tmp_path_factory.mktemp("blend")
    a, b = token_file(folder, "a", 200), token_file(folder, "b", 150)
    return ["--data-path", "0.5", a, "0.5", b, "--split", "80,10,10", "--data-cache-path",
            str(folder / "cache")]  # fmt: skip


def kept(folder: Path, *words: str, load: bool = False) -> Outcome:
    """A run that saves into a folder, and goes on from it where `load` says so."""
    load_it = ["--load", str(folder)] if load else []
    return alone(*words, "--save", str(folder), "--save-interval", "99", *load_it)


def test_iterations_are_iterations_in_a_batch_ramp(data: list[str], folder: Path) -> None:
    done = kept(folder, *data, *RAMP, "--lr-warmup-iters", "4", "--lr-decay-style", "linear",
                "--weight-decay-incr-style", "linear", "--start-weight-decay", "0",
                "--end-weight-decay", "0.1")  # fmt: skip
    assert done.rc == 0, done.err
    found = steps(folder)
    assert [r.global_batch_size for r in found] == [2] * 4 + [4] * 2 + [6] * 2 + [8] * 12
    rates = [r.learning_rate for r in found]
    assert rates[3] == pytest.approx(1e-2, rel=1e-12) and max(rates) == rates[3]
    assert rates[-1] == pytest.approx(0.0, abs=1e-12) and rates[-2] > 0.0
    assert [r.weight_decay for r in found] == pytest.approx(
        [0.1 * r.samples / found[-1].samples for r in found], rel=1e-12
    )


def test_the_last_iterations_of_wsd_decay_in_a_ramp_too(data: list[str], folder: Path) -> None:
    done = kept(folder, *data, *RAMP, "--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "5",
                "--lr-wsd-decay-style", "linear")  # fmt: skip
    assert done.rc == 0, done.err
    rates = [r.learning_rate for r in steps(folder)]
    assert rates[14:] == pytest.approx([1e-2 * left / 5 for left in range(5, -1, -1)], abs=1e-12)


def test_the_time_left_is_that_of_the_samples_left(data: list[str], folder: Path) -> None:
    assert kept(folder, *data, *RAMP).rc == 0
    for r in steps(folder):
        left = (4 * 2 + 2 * 4 + 2 * 6 + 12 * 8) - r.samples
        assert r.eta_seconds == pytest.approx(left / r.samples_per_second, rel=1e-9)


@pytest.mark.parametrize(
    ("samples", "taken"),
    [pytest.param(8, 2, marks=pytest.mark.slow), pytest.param(10, 2, marks=pytest.mark.slow), (11, 2), (12, 3)],
)  # fmt: skip
def test_a_budget_of_samples_is_whole_batches(
    samples: int, taken: int, blend: list[str], folder: Path
) -> None:
    words = [*blend, "--train-samples", str(samples), "--lr-warmup-samples", "4"]
    without = ("--train-iters", "--lr-warmup-iters")
    save = ["--save", str(folder), "--save-interval", "99", "--load", str(folder)]
    done = alone(*words, *save, without=without)
    assert done.rc == 0, done.err
    assert f"setting training iterations to {taken}" in done.out
    assert [r.train_iters for r in steps(folder)] == [taken] * taken
    assert steps(folder)[-1].eta_seconds == 0.0
    again = alone(*words, *save, without=without)
    assert again.rc == 0 and f"{taken} of {taken} iterations" in again.out, again.err
    assert "raise --train-samples" in again.out


def test_with_a_step_schedule_the_step_that_the_budget_ends_in_counts(
    blend: list[str], folder: Path
) -> None:
    words = ["--step-batch-size-schedule", "0:4 128:8", "--train-samples", "18"]
    without = ("--train-iters", "--lr-warmup-iters", "--global-batch-size")
    done = alone(*blend, *words, "--save", str(folder), "--save-interval", "9", without=without)
    assert done.rc == 0, done.err
    assert [r.samples for r in steps(folder)] == [4, 8, 16, 24]


def older_progress(progress: Progress) -> dict[str, Any]:
    """What versions wrote that did not keep how the batch size changed."""
    return {key: value for key, value in asdict(progress).items() if key != "batches"}


@pytest.mark.parametrize("tells", [True, False])
def test_the_same_samples_in_smaller_batches_after_a_resume(
    tells: bool, blend: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ["--global-batch-size", "8", "--train-iters", "8"]
    with monkeypatch.context() as patch:
        if not tells:
            patch.setattr(Progress, "to_json", older_progress)
        assert kept(folder, *blend, *before, "--exit-interval", "4").rc == 0
    after = ["--global-batch-size", "4", "--train-iters", "12"]
    done = kept(folder, *blend, *after, load=True)
    assert done.rc == 0, done.err
    found = steps(folder)
    assert [r.samples for r in found] == [8, 16, 24, 32, *range(36, 65, 4)]
    assert found[-1].learning_rate == pytest.approx(0.0, abs=1e-12)
    assert "train:      64" in done.out and found[-1].eta_seconds == 0.0
    again = kept(folder, *blend, *after, load=True)
    assert again.rc == 0 and "has 12 of 12 iterations (64 of 64 samples)" in again.out


def test_data_that_are_read_once_end_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    a, b = token_file(tmp_path, "a", 12), token_file(tmp_path, "b", 8)
    folder = tmp_path / "run"
    words = ["--data-path", a, b, "--split", "100,0,0", "--train-iters", "9"]
    done = kept(folder, *words, load=True)
    assert done.rc == DataError.exit_code
    there = [line for line in done.err.splitlines() if "which are read once" in line]
    assert "THE RUN WILL END AT ITERATION 5" in there[0] and "--train-iters 5" in there[0]
    assert there[1].startswith("FATAL[3]") and "after iteration 5" in there[1]
    assert [r.iteration for r in steps(folder)] == [1, 2, 3, 4, 5]
    assert (folder / "iter_0000005" / "manifest.json").is_file()
    again = kept(folder, *words, load=True)
    assert again.rc == DataError.exit_code and "have been read" in again.err
    rest = kept(folder, *words, "--dataloader-type", "cyclic", "--allow-data-change", load=True)
    assert rest.rc == 0, rest.err


class Read:
    """Where every evaluation batch began, by the number of steps done before it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.starts: list[tuple[str, int]] = []
        inner = Loader.next_batches

        def noting(loader: Loader, consumed: int, *rest: int) -> Any:
            for split in ("valid", "test"):
                if split in (getattr(loader.dataset, "split", ""), loader.dataset.name.split()[0]):
                    self.starts.append((split, consumed))
            return inner(loader, consumed, *rest)

        patch.setattr(Loader, "next_batches", noting)

    def take(self, split: str) -> list[int]:
        taken = [start for which, start in self.starts if which == split]
        self.starts = []
        return taken


@pytest.mark.parametrize("iters", [1, 3])
def test_validation_goes_on_where_it_stood_with_other_evaluation_flags(
    iters: int, blend: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Read(monkeypatch)
    words = [*blend, "--eval-interval", "1"]
    assert kept(folder, *words, "--eval-iters", "2", "--exit-interval", "2").rc == 0
    assert read.take("valid") == [0, 4, 8, 12]
    done = kept(folder, *words, "--eval-iters", str(iters), load=True)
    assert done.rc == 0, done.err
    assert read.take("valid") == [16 + 4 * k for k in range(3 * iters)]


def test_an_evaluation_alone_reads_from_the_first_sample_whatever_its_flags(
    blend: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Read(monkeypatch)
    assert kept(folder, *blend, "--eval-iters", "2", "--eval-interval", "1").rc == 0
    read.take("valid")
    alone_with = ["--skip-train", "--eval-interval", "2", "--eval-iters", "3"]
    done = alone(*blend, "--load", str(folder), *alone_with)
    assert done.rc == 0, done.err
    assert "validation: 12" in done.out
    assert read.take("valid") == [0, 4, 8]


def test_validation_data_that_are_read_once_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Read(monkeypatch)
    a, b = token_file(tmp_path, "a", 40), token_file(tmp_path, "b", 20)
    folder = tmp_path / "run"
    done = kept(folder, "--data-path", a, b, "--split", "80,10,10", "--eval-interval", "2",
                "--eval-iters", "3")  # fmt: skip
    assert done.rc == 0, done.err
    assert read.take("valid") == [4 * k for k in range(9)]
    assert " > validation: 6 samples are there and 36 are read" in done.out
    assert all(record.loss > 0.0 for record in evaluations(folder))


def test_a_batch_without_a_counted_token_is_skipped_by_its_samples(
    tmp_path: Path, folder: Path
) -> None:
    pair = write_pair(tmp_path / "ends", [[60] * 8] * 90)
    ends = ["--data-path", pair, "--split", "100,0,0", "--eod-mask-loss"]
    done = kept(folder, *ends)
    assert done.rc == 0, done.err
    assert "iteration 1: nothing in the samples 0 to 3 counts in the loss" in done.err
    found = steps(folder)
    assert [r.skipped_iterations for r in found] == [1] * 4
    assert [r.nan_iterations for r in found] == [0] * 4
    assert {r.learning_rate for r in found} == {0.0}, "a skipped step moves no curve"
    assert "WARNING: *** NO OPTIMIZER STEP RAN: all 4 steps were skipped; their" in done.err


def test_an_fp16_run_whose_steps_all_overflow_says_so_at_its_end(
    data: list[str], folder: Path
) -> None:
    done = kept(folder, *data, "--fp16", "--initial-loss-scale", "4294967296")
    assert done.rc == 0, done.err
    assert (
        "WARNING: *** NO OPTIMIZER STEP RAN: all 4 steps were skipped, at a loss scale from "
        "4.29497e+09 to 5.36871e+08;" in done.err
    )
    assert "begin at --initial-loss-scale 65536" in done.err
    lower = kept(folder.with_name("lower"), *data, "--fp16", "--initial-loss-scale", "65536")
    assert lower.rc == 0 and "NO OPTIMIZER STEP RAN" not in lower.err
