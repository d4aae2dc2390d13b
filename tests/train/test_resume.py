"""Interrupted is uninterrupted, to the last bit; and the checkpoint's flags do what they say."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_lite.checkpoint.store import Store
from megatron_lite.config.errors import CheckpointError, ConfigError, NumericsError, StorageError
from megatron_lite.data.loader import Loader
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.telemetry.record import SaveRecord
from tests.support.corpora import growing, write_pair
from tests.support.launch import TOOL
from tests.train.runs import MLiteFault, Outcome, alone, curve, manifest, on_ranks, records, steps

BIT_EXACT = {
    "serial": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "dp2": (2, "--micro-batch-size 1"),
    "dropout": (1, "--hidden-dropout 0.1 --attention-dropout 0.1"),
    "bf16": (1, "--bf16"),
    "fp16-scaling": (1, "--fp16 --initial-loss-scale 1e6 --hysteresis 1 --loss-scale-window 1"),
    "ramp-up": (1, "--rampup-batch-size 2 2 4 --micro-batch-size 1"),
    "accumulation": (1, "--global-batch-size 16"),
    "sgd": (1, "--optimizer sgd"),
    "workers": (1, "--num-workers 2"),
    "restarts": (1, "--lr-warmup-iters 0 --lr-restarts 1"),
}


def saved(data: list[str], folder: Path, *words: str, ranks: int = 1) -> Outcome:
    """A run that saves every two steps."""
    done = on_ranks(ranks, *data, "--save", str(folder), "--save-interval", "2", *words)
    assert done.rc == 0, done.err
    return done


@pytest.mark.parametrize("name", BIT_EXACT)
def test_two_steps_and_two_more_are_four(name: str, data: list[str], tmp_path: Path) -> None:
    ranks, extra = BIT_EXACT[name]
    once, again = tmp_path / "once", tmp_path / "again"
    straight = saved(data, once, *extra.split(), ranks=ranks)
    load = ["--load", str(once), "--ckpt-step", "2"]
    resumed = saved(data, again, *extra.split(), *load, ranks=ranks)
    assert f"loaded checkpoint from {once} at iteration 2" in resumed.out
    assert [r.iteration for r in steps(again)] == [3, 4]
    assert curve(steps(again)) == curve(steps(once)[2:])
    assert resumed.state_hash == straight.state_hash
    if name == "fp16-scaling":
        assert any(r.skipped_iterations for r in steps(once)), "nothing overflowed"
        assert any(not r.skipped_iterations for r in steps(again))
    if name == "ramp-up":
        assert len({r.global_batch_size for r in steps(once)}) > 1
    if name == "restarts":
        assert [r.learning_rate for r in steps(once)] == [5e-3, 1e-2, 5e-3, 0.0]


def test_a_stop_by_interval_and_a_second_call_make_one_run(data: list[str], folder: Path) -> None:
    """The same command line twice, as a cluster's scheduler calls it: one metrics.jsonl, no gap."""
    words = ["--save", str(folder), "--load", str(folder)]
    straight = alone(*data)
    first = alone(*data, *words, "--exit-interval", "2")
    assert first.rc == 0 and "[stopped by --exit-interval] iteration 2" in first.out
    assert "STARTING FRESH" in first.err
    second = alone(*data, *words, "--save-interval", "4")
    assert second.rc == 0, second.err
    assert [r.iteration for r in steps(folder)] == [1, 2, 3, 4]
    assert second.state_hash == straight.state_hash
    third = alone(*data, *words, "--save-interval", "4")
    assert third.rc == 0 and "nothing left to do" in third.out
    assert third.state_hash == straight.state_hash


@pytest.mark.parametrize("precision", ["", "--bf16"])
def test_the_state_hash_is_the_same_in_every_layout(
    precision: str, data: list[str], tmp_path: Path
) -> None:
    """Nothing is trained after the load, so that the states are equal and not only close."""
    folder = tmp_path / "run"
    straight = saved(data, folder, *precision.split())
    load = ["--load", str(folder), "--skip-train", *precision.split()]
    hashes = {
        on_ranks(ranks, *data, *load, *layout.split()).state_hash
        for ranks, layout in (
            (1, ""),
            (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
            (2, "--pipeline-model-parallel-size 2"),
            (2, ""),
        )
    }
    assert hashes == {straight.state_hash}
    other = alone(*data, *load, "--ckpt-step", "2").state_hash
    assert other != straight.state_hash, "the hash does not see the state"


def test_a_run_goes_on_at_another_layout(data: list[str], tmp_path: Path) -> None:
    once, again = tmp_path / "once", tmp_path / "again"
    saved(data, once, "--pipeline-model-parallel-size", "2", ranks=2)
    load = ["--load", str(once), "--ckpt-step", "2"]
    saved(data, again, *load, "--tensor-model-parallel-size", "2", ranks=2)
    assert [r.loss for r in steps(again)] == pytest.approx(
        [r.loss for r in steps(once)[2:]], rel=1e-5
    )


def resumed_with(data: list[str], folder: Path, *words: str) -> Outcome:
    return alone(*data, "--load", str(folder), "--ckpt-step", "2", *words)


def test_changed_learning_rate_flags_are_refused_with_both_values(
    data: list[str], folder: Path
) -> None:
    saved(data, folder)
    changed = ["--lr", "2e-2", "--weight-decay", "0.1", "--lr-warmup-iters", "0"]
    done = resumed_with(data, folder, *changed, "--lr-restarts", "1")
    assert done.rc == CheckpointError.exit_code
    assert "--lr: 0.01 -> 0.02" in done.err and "--lr-restarts: 0 -> 1" in done.err
    assert "weight decay at the end (--weight-decay, --end-weight-decay): 0.01 -> 0.1" in done.err
    assert "--override-opt-param-scheduler" in done.err
    assert "--use-checkpoint-opt-param-scheduler" in done.err


def test_the_run_s_length_is_part_of_the_curve(data: list[str], folder: Path) -> None:
    saved(data, folder)
    done = resumed_with(data, folder, "--train-iters", "8")
    assert done.rc == CheckpointError.exit_code
    assert "--train-samples or --train-epochs): 16 -> 32" in done.err
    same = resumed_with(data, folder, "--train-iters", "8", "--lr-decay-iters", "4")
    assert same.rc == 0, "the decay's length is what it was"


def test_either_flag_says_which_learning_rate_to_take(data: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    saved(data, folder)
    changed = ["--lr", "2e-2", "--train-iters", "8"]
    rates = {}
    for flag in ("--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"):
        out = tmp_path / flag
        done = resumed_with(
            data, folder, *changed, flag, "--save", str(out), "--save-interval", "8"
        )
        assert done.rc == 0, done.err
        assert f"{flag}: --lr: 0.0" in done.out
        rates[flag] = [r.learning_rate for r in steps(out)]
    kept = [r.learning_rate for r in steps(folder)]
    assert rates["--use-checkpoint-opt-param-scheduler"] == [*kept[2:], 0.0, 0.0, 0.0, 0.0]
    fresh = tmp_path / "fresh"
    alone(*data, *changed, "--save", str(fresh), "--save-interval", "8")
    assert rates["--override-opt-param-scheduler"] == [r.learning_rate for r in steps(fresh)[2:]]


def test_finetune_starts_at_zero_with_the_weights(data: list[str], tmp_path: Path) -> None:
    folder, tuned = tmp_path / "run", tmp_path / "tuned"
    saved(data, folder)
    words = ["--finetune", "--lr", "1e-3", "--save", str(tuned), "--exit-interval", "1"]
    done = alone(*data, "--load", str(folder), *words)
    assert done.rc == 0, done.err
    (first,) = steps(tuned)
    assert (first.iteration, first.samples) == (1, 4)
    assert first.loss < steps(folder)[0].loss - 0.1, "these are not trained weights"
    assert manifest(tuned, 1).progress.optimizer_steps == 1
    assert manifest(folder, 4).progress.optimizer_steps == 4


def first_moments(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / f"iter_{iteration:07d}" / "optimizer-00000.safetensors")
    stored = manifest(folder, iteration).tensors
    return {
        name: tensors[tensor.pieces[0].key]
        for name, tensor in stored.items()
        if name.startswith("exp_avg.")
    }


def test_the_next_shard_of_data_is_read_with_the_optimizer_of_the_last(
    data: list[str], tmp_path: Path
) -> None:
    """Another corpus, length and learning rate: nothing is refused, and Adam goes on where it was."""
    folder, kept, fresh = (tmp_path / name for name in ("run", "kept", "fresh"))
    saved(data, folder, "--fp16", "--initial-loss-scale", "1024", "--loss-scale-window", "3")
    shard = write_pair(tmp_path / "next_text_document", growing(90, 11))
    words = ["--data-path", shard, "--split", "1,0,0", "--fp16", "--initial-loss-scale", "4096",
             "--lr", "3e-3", "--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--train-iters", "3",
             "--load", str(folder), "--finetune", "--save-interval", "1"]  # fmt: skip
    on = alone(*words, "--keep-optim", "--save", str(kept))
    anew = alone(*words, "--save", str(fresh))
    assert on.rc == anew.rc == 0, on.err + anew.err
    assert (
        "--finetune --keep-optim: weights, the optimizer's state after 4 updates and loss scale 2048 go "
        "on; iteration and samples start at 0, data and learning rate are this command line's"
    ) in on.out
    assert "weights only; iteration, samples and optimizer start anew" in anew.out
    assert [(r.iteration, r.samples, r.learning_rate) for r in steps(kept)] == [
        (n, 4 * n, 3e-3) for n in (1, 2, 3)
    ]
    assert [r.loss_scale for r in steps(kept)][:1] == [2048.0] != [steps(fresh)[0].loss_scale]
    assert steps(kept)[0].loss == steps(fresh)[0].loss, "the same weights read the same samples"
    before, after, alone_ = (first_moments(f, n) for f, n in ((folder, 4), (kept, 1), (fresh, 1)))
    for name, moment in after.items():
        torch.testing.assert_close(moment, 0.9 * before[name] + alone_[name], rtol=1e-3, atol=1e-7)
    assert max(moment.abs().max() for moment in before.values()) > 1e-3, before.keys()
    counted = manifest(kept, 3).progress
    assert (counted.step, counted.optimizer_steps, counted.inherited_steps) == (3, 7, 4)
    resumed = alone(
        *words[: words.index("--load")], "--load", str(kept), "--ckpt-step", "1", "--save",
        str(tmp_path / "again"), "--save-interval", "3",
    )  # fmt: skip
    assert resumed.rc == 0, resumed.err
    assert resumed.state_hash == on.state_hash, "the new run resumes like any other"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--keep-optim"], "--keep-optim is for --finetune"),
        (["--keep-optim", "--finetune", "--no-load-optim"], "contradict each other"),
    ],
    ids=["alone", "with its opposite"],
)
def test_what_keeps_an_optimizer_is_said_with_what_loads_it(
    words: list[str], said: str, data: list[str], tmp_path: Path
) -> None:
    done = alone(*data, "--load", str(tmp_path), *words)
    assert done.rc == ConfigError.exit_code and said in done.err


def test_without_its_optimizer_a_run_goes_on_with_a_fresh_one(
    data: list[str], tmp_path: Path
) -> None:
    folder, fresh = tmp_path / "run", tmp_path / "fresh"
    whole = saved(data, folder)
    words = ["--no-load-optim", "--no-load-rng", "--save", str(fresh), "--save-interval", "2"]
    done = resumed_with(data, folder, *words)
    assert done.rc == 0, done.err
    assert "optimizer state and loss scale start anew" in done.out
    assert "--no-load-rng: changes nothing" in done.out
    assert [r.iteration for r in steps(fresh)] == [3, 4]
    assert steps(fresh)[0].loss == steps(folder)[2].loss, "same weights, same samples"
    assert manifest(fresh, 4).progress.optimizer_steps == 2
    assert done.state_hash != whole.state_hash


def test_a_checkpoint_without_optimizer_is_smaller_and_says_so(
    data: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    saved(data, folder, "--no-save-optim")
    names = manifest(folder, 4).tensors
    assert "embedding.tokens.weight" in names
    assert not any(name.startswith(("exp_avg", "master.")) for name in names)
    done = resumed_with(data, folder)
    assert done.rc == CheckpointError.exit_code
    assert "--no-save-optim" in done.err and "--no-load-optim" in done.err
    assert resumed_with(data, folder, "--no-load-optim").rc == 0


def test_keep_last_and_a_missing_step(data: list[str], folder: Path) -> None:
    done = alone(*data, "--save", str(folder), "--save-interval", "1", "--keep-last", "2")
    assert done.rc == 0, done.err
    assert sorted(p.name for p in folder.glob("iter_*")) == ["iter_0000003", "iter_0000004"]
    done = alone(*data, "--load", str(folder), "--ckpt-step", "1")
    assert done.rc == CheckpointError.exit_code and "iteration 1" in done.err


def test_a_missing_checkpoint_is_a_fresh_start_or_an_exit(data: list[str], folder: Path) -> None:
    done = alone(*data, "--load", str(folder), "--train-iters", "2")
    assert done.rc == 0 and "STARTING FRESH" in done.err
    done = alone(*data, "--load", str(folder), "--exit-on-missing-checkpoint")
    assert done.rc == CheckpointError.exit_code and "--exit-on-missing-checkpoint" in done.err


@pytest.fixture
def poisoned(data: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that is not finite, as saves wrote them that did not look."""
    with (
        monkeypatch.context() as without,
        MLiteFault("step2.gradient:0:nan=blocks.0.mlp.up.weight"),
    ):
        without.setattr("megatron_lite.checkpoint.tensor_file._is_finite", lambda values: True)
        saved(data, folder, "--no-check-for-nan-in-loss-and-grad", "--exit-interval", "2")
    return folder


@pytest.mark.ci
def test_a_checkpoint_that_is_not_finite_is_refused_when_loaded(
    data: list[str], poisoned: Path, tmp_path: Path
) -> None:
    done = alone(*data, "--load", str(poisoned))
    assert done.rc == NumericsError.exit_code
    assert f"checkpoint 2 in {poisoned}: the weight " in done.err and "--ckpt-step" in done.err
    for tool, *words in (
        ("generate.py", "--load", str(poisoned), "--use-cpu", "--prompt", "1 2"),
        ("convert.py", str(poisoned), str(tmp_path / "theirs"), "--no-tokenizer"),
    ):
        ended = subprocess.run(
            [sys.executable, str(TOOL.with_name(tool)), *words],
            capture_output=True, text=True, timeout=90,
        )  # fmt: skip
        assert ended.returncode == NumericsError.exit_code, ended.stderr
        assert "holds values that are not finite" in ended.stderr
    assert not (tmp_path / "theirs").exists()


def test_another_global_batch_goes_on_without_gap_or_repeat(
    data: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    read = Loader.next_batches

    def record(self, *asked):
        batches = read(self, *asked)
        seen.extend(int(n) for batch in batches for n in batch.sample_numbers)
        return batches

    monkeypatch.setattr(Loader, "next_batches", record)
    flat = ["--lr-decay-style", "constant", "--lr-warmup-iters", "0"]
    saved(data, folder, *flat, "--exit-interval", "2")
    load = ["--load", str(folder), *flat, "--train-iters", "5"]
    done = alone(*data, *load, "--global-batch-size", "6", "--micro-batch-size", "1")
    assert done.rc == 0, done.err
    assert seen == list(range(2 * 4 + 3 * 6))


def test_metrics_of_steps_that_are_made_again_are_dropped(data: list[str], folder: Path) -> None:
    saved(data, folder)
    before = records(folder)
    resumed_with(data, folder, "--save", str(folder), "--save-interval", "2")
    kinds = [(r.kind, r.iteration) for r in records(folder)]
    assert kinds == [(r.kind, r.iteration) for r in before]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_written_beside_the_training_is_the_same(
    ranks: int, data: list[str], tmp_path: Path
) -> None:
    """--async-save: every file of every checkpoint has the hash it has without it."""
    at_once, beside = tmp_path / "at once", tmp_path / "beside"
    extra = ["--micro-batch-size", "1"] if ranks == 2 else ["--bf16"]
    straight = saved(data, at_once, *extra, ranks=ranks)
    later = saved(data, beside, *extra, "--async-save", ranks=ranks)
    assert later.state_hash == straight.state_hash
    for step in (2, 4):
        assert manifest(beside, step).files == manifest(at_once, step).files
        assert manifest(beside, step).progress == manifest(at_once, step).progress
    found = [r for r in records(beside) if isinstance(r, SaveRecord)]
    assert [r.iteration for r in found] == [2, 4]
    assert all(r.stalled_seconds is not None and r.bytes for r in found)


@pytest.mark.parametrize("way", [[], ["--async-save"]])
def test_a_failing_save_stops_the_run_or_is_passed_over(
    way: list[str], data: list[str], tmp_path: Path
) -> None:
    words = [*data, "--save-interval", "1", *way, "--save"]
    with MLiteFault("save.before_complete:0:error5"):
        stopped = alone(*words, str(tmp_path / "stop"))
        warned = alone(*words, str(tmp_path / "warn"), "--save-failure", "warn")
    assert stopped.rc == StorageError.exit_code and "on purpose" in stopped.err
    assert not list((tmp_path / "stop").glob("iter_*")) and len(steps(tmp_path / "stop")) < 4
    assert warned.rc == 0 and "training continues" in warned.err
    kept = sorted(p.name for p in (tmp_path / "warn").glob("iter_*"))
    assert kept == ["iter_0000002", "iter_0000003", "iter_0000004"]
    assert not list((tmp_path / "warn").glob(".iter*"))


def test_the_last_save_must_not_fail(data: list[str], folder: Path) -> None:
    words = [*data, "--save", str(folder), "--save-interval", "9", "--save-failure", "warn"]
    for way in ([], ["--async-save"]):
        with MLiteFault("save.before_complete:0:error5"):
            assert alone(*words, *way).rc == StorageError.exit_code


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_text("100\n"), "is a file"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{}")), "convert.py"),
        (lambda path: (path.mkdir(), (path / "model.pt").write_text("x")), "never opened"),
    ],
    ids=["a file", "a folder of Hugging Face", "a pickle"],
)
def test_what_is_not_ours_is_no_reason_to_start_fresh(
    data: list[str], tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    make(tmp_path / "theirs")
    done = alone(*data, "--load", str(tmp_path / "theirs"), "--train-iters", "2")
    assert done.rc == 4 and said in done.err, done.err


def test_a_refused_start_leaves_the_run_as_it_was(data: list[str], tmp_path: Path) -> None:
    words = [*data, "--save", str(tmp_path / "run"), "--train-iters", "2", "--save-interval", "2"]
    assert alone(*words).rc == 0
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    inside = str(tmp_path / "run" / "iter_0000002")
    done = alone(*words, "--load", inside)
    assert done.rc == 4 and "--ckpt-step 2" in done.err, done.err
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    new = ["--load", str(tmp_path / "nowhere"), "--finetune", "--overwrite-run"]
    done = alone(*words, *new)
    assert done.rc == 4 and "--finetune" in done.err, done.err
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert (tmp_path / "run" / "iter_0000002").is_dir()


def test_clocks_that_jump_and_names_that_change_are_no_matter(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed a decade earlier on another host, with hours gained and lost at every look at the clock."""
    once, again = tmp_path / "once", tmp_path / "again"
    straight = saved(data, once)
    looks = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1.4e9 + 1e4 * (-1) ** next(looks))
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    load = ["--load", str(once), "--ckpt-step", "2", "--exit-duration-in-mins", "60"]
    resumed = saved(data, again, *load)
    assert curve(steps(again)) == curve(steps(once)[2:]) and next(looks) >= 1
    assert resumed.state_hash == straight.state_hash
    _, notices = Store(again, ParallelContext.serial()).newest_intact()
    assert notices == []
