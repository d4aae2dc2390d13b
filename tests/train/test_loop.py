"""What a run prints and records, and that each of its flags does what it says."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_lite.config.errors import ConfigError
from megatron_lite.train.measuring.device import memory_line
from megatron_lite.train.measuring.timing import LEVELS
from tests.train.runs import alone, curve, evaluations, on_ranks, records, steps

LINE = re.compile(
    r" iteration +(\d+)/ +(\d+) \| consumed samples: +(\d+) \| consumed tokens: +(\d+) \| "
    r"elapsed time per iteration \(ms\): ([\d.]+) \| learning rate: ([\d.]+E[+-]\d+) \| "
    r"global batch size: +(\d+) \| lm loss: ([\d.]+E[+-]\d+) \| loss scale: ([\d.]+) \| "
    r"grad norm: ([\d.]+) \| (?:num zeros: ([\d.]+) \| params norm: ([\d.]+) \| )?"
    r"actual seqlen: +(\d+) \| number of skipped iterations: +(\d+) \| "
    r"number of nan iterations: +(\d+) \| samples per second: ([\d.]+) \| "
    r"tokens per gpu per second \(tgs\): ([\d.]+) \| TFLOPs: ([\d.]+) \| MFU: - \|"
)


def save_to(folder: Path) -> list[str]:
    return ["--save", str(folder), "--save-interval", "100"]


def test_the_log_line_says_what_the_records_say(data: list[str], folder: Path) -> None:
    words = ["--log-interval", "3", "--train-iters", "7"]
    done = alone(*data, *save_to(folder), *words)
    assert done.rc == 0, done.err
    lines = [LINE.fullmatch(line) for line in done.out.splitlines() if " iteration " in line[:11]]
    assert all(lines)
    made = steps(folder)
    # the first, every third, and the last
    intervals = [made[:1], made[1:3], made[3:6], made[6:]]
    assert [int(line[1]) for line in lines] == [1, 3, 6, 7]
    for line, interval in zip(lines, intervals, strict=True):
        last = interval[-1]
        assert [int(line[n]) for n in (2, 3, 4, 7)] == [7, last.samples, last.tokens, 4]
        assert line[6] == f"{last.learning_rate:.3E}"
        mean = sum(r.loss for r in interval) / len(interval)
        assert float(line[8]) == pytest.approx(mean, rel=1e-6)
        assert line[10] == f"{last.grad_norm:.3f}"
        assert [int(line[n]) for n in (13, 14, 15)] == [16, 0, 0]
        assert float(line[17]) == pytest.approx(float(line[16]) * 16, rel=1e-3)


def test_one_record_per_step_with_every_number(data: list[str], folder: Path) -> None:
    words = ["--log-params-norm", "--log-num-zeros-in-grad"]
    assert alone(*data, *save_to(folder), *words).rc == 0
    made = steps(folder)
    assert [r.iteration for r in made] == [1, 2, 3, 4]
    assert [r.samples for r in made] == [4, 8, 12, 16]
    assert [r.tokens for r in made] == [64, 128, 192, 256]
    assert [r.warmup for r in made] == [True, False, False, False]
    for r in made:
        assert r.params_norm and r.params_norm > 0.0
        assert r.num_zeros is not None and 0 <= r.num_zeros < 28032
        assert 0.0 <= r.data_seconds < r.seconds_per_iteration
        assert r.mfu is None and r.memory_bytes is None


def test_the_lines_users_look_for(data: list[str], folder: Path) -> None:
    done = on_ranks(2, *data, *save_to(folder), "--tensor-model-parallel-size", "2")
    assert done.rc == 0, done.err
    for text in (
        "using world size: 2, tensor-parallel 2 x pipeline-parallel 1 x data-parallel 1",
        "setting training iterations to 4",
        " > number of parameters on (tensor, pipeline) model parallel rank (0, 0): ",
        " > number of parameters on (tensor, pipeline) model parallel rank (1, 0): ",
        "> building train, validation, and test datasets ...",
        " > datasets target sizes (minimum size):",
        "    train:      16",
        "done with setup ... datetime: ",
        "(min, max) time across ranks (ms):\n    model-and-optimizer-setup ....",
        "training ...",
        "  successfully saved checkpoint from iteration       4 to ",
        "[after training is done] iteration 4; checkpoint in ",
        "exiting program at iteration 4 datetime: ",
    ):
        assert done.out.count(text) == 1, text


def test_the_memory_line_is_for_accelerators() -> None:
    assert memory_line(torch.device("cpu"), rank=0, iterations=1) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_memory_line_has_megatron_s_words() -> None:
    line = memory_line(torch.device("cuda", 0), rank=3, iterations=7)
    assert line is not None
    number = r"\d+\.\d\d"
    assert re.fullmatch(
        r"\[Rank 3\] \(after 7 iterations\) memory \(MB\) \| allocated: "
        rf"{number} \| max allocated: {number} \| reserved: {number} \| max reserved: {number}",
        line,
    )


def test_evaluation_at_its_interval_and_at_the_end(data: list[str], folder: Path) -> None:
    done = alone(*data, *save_to(folder), "--eval-interval", "2", "--eval-iters", "1")
    assert done.rc == 0, done.err
    found = [(r.iteration, r.split, r.final) for r in evaluations(folder)]
    assert found == [
        (2, "validation", False), (4, "validation", False),
        (4, "validation", True), (4, "test", True),
    ]  # fmt: skip
    for r in evaluations(folder):
        assert r.perplexity == pytest.approx(math.exp(r.loss))
    assert " validation loss at iteration 2 | lm loss value: " in done.out
    assert " validation loss at iteration 4 on test set | lm loss value: " in done.out


def test_skip_train_only_evaluates(data: list[str], tmp_path: Path) -> None:
    run, looked = tmp_path / "run", tmp_path / "looked"
    words = ["--eval-iters", "2", "--eval-interval", "100"]
    trained = alone(*data, *save_to(run), *words)
    load = ["--load", str(run), "--skip-train", "--save", str(looked)]
    done = alone(*data, *load, *words)
    assert done.rc == 0, done.err
    assert steps(looked) == [] and not list(looked.glob("iter_*"))
    by_split = {r.split: r.loss for r in evaluations(looked)}
    assert by_split["test"] == evaluations(run)[-1].loss
    assert set(by_split) == {"validation", "test"}
    assert done.state_hash == trained.state_hash


TENSORBOARD = {
    "lm loss", "learning-rate", "batch-size", "loss-scale", "grad-norm", "throughput", "tgs",
    "lm loss validation", "lm loss test",
}  # fmt: skip
MORE_TENSORBOARD = {
    "num-zeros", "params-norm", "world-size", "iteration-time", "lm loss validation ppl",
    "lm loss test ppl", "forward-backward-time", "optimizer-time", "all-grads-sync-time",
    "batch-generator-time",
}  # fmt: skip


def scalars(folder: Path) -> dict[str, list[int]]:
    """Name -> x values of each scalar of an event folder."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [e.step for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("every", [1, 2])
def test_tensorboard_has_megatron_s_names(every: int, data: list[str], folder: Path) -> None:
    words = ["--tensorboard-dir", str(folder / "tb"), "--eval-iters", "1", "--eval-interval", "4",
             "--tensorboard-log-interval", str(every), "--tensorboard-queue-size", "3"]  # fmt: skip
    names = set(TENSORBOARD)
    if every == 1:
        words += ["--log-params-norm", "--log-num-zeros-in-grad", "--log-world-size-to-tensorboard",
                  "--log-timers-to-tensorboard", "--log-validation-ppl-to-tensorboard",
                  "--timing-log-level", "1"]  # fmt: skip
        names |= MORE_TENSORBOARD
    else:
        words += ["--no-log-learnig-rate-to-tensorboard", "--no-log-loss-scale-to-tensorboard",
                  "--no-log-batch-size-to-tensorboard", "--no-log-throughput"]  # fmt: skip
        names -= {"learning-rate", "loss-scale", "batch-size", "throughput", "tgs"}
    assert alone(*data, *save_to(folder), *words).rc == 0
    found = scalars(folder / "tb")
    assert set(found) == names | {f"{name} vs samples" for name in names}
    assert found["lm loss"] == list(range(every, 5, every))
    assert found["lm loss vs samples"] == [4 * n for n in range(every, 5, every)]


@pytest.mark.parametrize(("level", "option"), [(1, "minmax"), (2, "max"), (2, "all")])
def test_timers_of_each_level_and_form(level: int, option: str, data: list[str]) -> None:
    words = ["--timing-log-level", str(level), "--timing-log-option", option]
    done = on_ranks(2, *data, *words, "--pipeline-model-parallel-size", "2")
    assert done.rc == 0, done.err
    printed = done.out[done.out.index("training ...") :]
    for name in ("forward-backward", "optimizer", "all-grads-sync", "batch-generator"):
        assert len(re.findall(rf"^ +{name}\b[ .]*:", printed, re.M)) == 4, name
    inner = ("forward-compute", "backward-compute", "forward-recv", "backward-recv")
    for name in (*inner, "optimizer-inner-step", "optimizer-clip-main-grad"):
        assert len(re.findall(rf"^ +{name}\b[ .]*:", printed, re.M)) == (4 if level == 2 else 0)
    heads = {"minmax": "(min, max) time", "max": "max time", "all": "times"}
    assert printed.count(f"{heads[option]} across ranks (ms):") == 4
    assert done.out.count(f"{heads[option]} across ranks (ms):") == 5  # and the setup
    if option == "all":
        assert printed.count("rank  1:") > 8
        # only the second stage receives activations, only the first one gradients
        assert re.search(r"  forward-recv:\n     rank  1: [\d.]+\n(?!     rank)", printed)


def test_the_parts_of_a_step_add_up(data: list[str], folder: Path) -> None:
    words = ["--timing-log-level", "2", "--global-batch-size", "16", "--eval-iters", "1",
             "--eval-interval", "1"]  # fmt: skip
    assert alone(*data, *save_to(folder), *words).rc == 0
    timings = [r for r in records(folder) if r.kind == "timing"]
    assert [r.iteration for r in timings] == [1, 2, 3, 4]
    for timing in timings:
        spent = timing.largest
        assert set(spent) <= set(LEVELS)
        assert spent["forward-compute"] + spent["backward-compute"] <= spent["forward-backward"]
        assert spent["optimizer-inner-step"] < spent["optimizer"]


def test_profile_writes_a_chrome_trace_of_the_chosen_ranks(data: list[str], folder: Path) -> None:
    words = ["--profile", "--profile-step-start", "2", "--profile-step-end", "4",
             "--profile-ranks", "1", "--micro-batch-size", "1"]  # fmt: skip
    done = on_ranks(2, *data, *save_to(folder), *words)
    assert done.rc == 0, done.err
    (trace,) = (folder / "traces").iterdir()
    assert trace.name == "trace-rank1.json"
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("_Scores") == 4  # two steps of two micro batches
    assert any("gloo:all_reduce" in name for name in names)


def test_a_profile_is_written_where_the_run_ends_early(data: list[str], folder: Path) -> None:
    words = ["--profile", "--profile-step-start", "3", "--profile-step-end", "100"]
    assert alone(*data, *save_to(folder), *words).rc == 0
    assert (folder / "traces" / "trace-rank0.json").stat().st_size > 1000


def test_settings_for_a_gpu_say_that_they_change_nothing_here(data: list[str]) -> None:
    words = ["--tf32", "--log-memory-to-tensorboard", "--profile", "--no-use-pytorch-profiler"]
    done = alone(*data, *words)
    assert done.rc == 0, done.err
    for flag in ("--tf32", "--log-memory-to-tensorboard", "--profile --no-use-pytorch-profiler"):
        assert f"{flag}: changes nothing on a CPU" in done.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_needs_a_gpu_and_gloo_none(data: list[str]) -> None:
    done = alone(*data, "--distributed-backend", "nccl", without=("--use-cpu",))
    assert done.rc == ConfigError.exit_code
    assert "--distributed-backend nccl needs a GPU; here use gloo" in done.err
    assert alone(*data, "--distributed-backend", "gloo", without=("--use-cpu",)).rc == 0


def losses(data: list[str], folder: Path, *words: str) -> list[float]:
    done = alone(*data, *save_to(folder), *words)
    assert done.rc == 0, done.err
    return [r.loss for r in steps(folder)]


def test_flags_that_change_the_numbers_do(data: list[str], tmp_path: Path) -> None:
    plain = losses(data, tmp_path / "plain")
    for number, words in enumerate(
        ["--seed 1", "--eod-mask-loss", "--split 50,25,25", "--init-method-std 0.1", "--swiglu",
         "--position-embedding-type rope", "--normalization RMSNorm", "--disable-bias-linear",
         "--untie-embeddings-and-output-weights", "--group-query-attention --num-query-groups 2",
         "--clip-grad 0.01 --optimizer sgd", "--adam-beta2 0.5", "--weight-decay 0.9 --lr 0.1",
         "--hidden-dropout 0.5", "--norm-epsilon 0.1"]
    ):  # fmt: skip
        other = losses(data, tmp_path / str(number), *words.split())
        assert other != plain, words
        assert all(map(math.isfinite, other)), words


def test_flags_that_must_not_change_the_numbers_do_not(data: list[str], tmp_path: Path) -> None:
    plain = losses(data, tmp_path / "plain")
    for number, words in enumerate(
        ["--no-gradient-accumulation-fusion", "--attention-backend unfused", "--num-workers 2",
         "--no-masked-softmax-fusion", "--no-bias-gelu-fusion", "--no-overlap-grad-reduce",
         "--micro-batch-size 1", "--no-mmap-bin-files", "--tf32", "--ddp-bucket-size 100",
         "--make-vocab-size-divisible-by 128", "--calculate-per-token-loss"]
    ):  # fmt: skip
        other = losses(data, tmp_path / str(number), *words.split())
        assert other == pytest.approx(plain, rel=1e-5), words


@pytest.mark.parametrize("layout", ["--micro-batch-size 1", "--pipeline-model-parallel-size 2"])
def test_gradients_through_autograd_reduce_alike(
    layout: str, data: list[str], tmp_path: Path
) -> None:
    """Small buckets, so that reductions start while the backward still runs."""
    found = []
    for number, words in enumerate(["", "--no-gradient-accumulation-fusion"]):
        folder = tmp_path / str(number)
        wanted = [*layout.split(), "--ddp-bucket-size", "1000", *words.split()]
        done = on_ranks(2, *data, *save_to(folder), *wanted)
        assert done.rc == 0, done.err
        found.append([(r.loss, r.grad_norm) for r in steps(folder)])
    for fused, through_autograd in zip(*found, strict=True):
        assert through_autograd == pytest.approx(fused, rel=1e-5)


def test_the_index_cache_lies_where_it_is_told(
    data: list[str], folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "elsewhere"
    done = alone(*data, *save_to(folder), "--data-cache-path", str(cache))
    assert done.rc == 0, done.err
    assert any(cache.rglob("*.*")) and not (folder / "index-cache").exists()


def test_train_samples_count_as_iterations_do(data: list[str], tmp_path: Path) -> None:
    by_iters, by_samples = tmp_path / "a", tmp_path / "b"
    assert alone(*data, *save_to(by_iters)).rc == 0
    words = ["--train-samples", "16", "--lr-warmup-samples", "4"]
    in_iters = ("--train-iters", "--lr-warmup-iters")
    done = alone(*data, *save_to(by_samples), *words, without=in_iters)
    assert done.rc == 0, done.err
    assert curve(steps(by_samples)) == curve(steps(by_iters))


def test_a_refused_setting_stops_before_anything_is_written(data: list[str], folder: Path) -> None:
    done = alone(*data, *save_to(folder), "--no-calculate-per-token-loss")
    assert done.rc == ConfigError.exit_code
    assert "--no-calculate-per-token-loss is not supported" in done.err
    assert not folder.exists()


def test_the_state_hash_of_a_tiny_state_by_hand(data: list[str], folder: Path) -> None:
    """sha256 of `name dtype shape` and the bytes of every tensor, by sorted name."""
    from safetensors.torch import load_file

    words = ["--no-save-optim", "--optimizer", "sgd", "--sgd-momentum", "0"]
    done = alone(*data, *save_to(folder), *words)
    assert done.rc == 0, done.err
    stored = load_file(folder / "iter_0000004" / "weights-00000.safetensors")
    whole = {key.split(":", 1)[1]: tensor for key, tensor in stored.items()}
    digest = hashlib.sha256()
    for name, tensor in sorted(whole.items()):
        digest.update(f"{name} torch.float32 {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    assert done.state_hash == digest.hexdigest()
