"""What is written can be read: by our reader, and by TensorBoard's own."""

from __future__ import annotations

import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lite.config.errors import ConfigError, StorageError
from megatron_lite.config.sections.telemetry import TelemetryConfig
from megatron_lite.storage.disk import Disk
from megatron_lite.telemetry.record import read_metrics, record_json
from megatron_lite.telemetry.writers import (
    JsonLines,
    TensorBoard,
    open_writers,
    scalars,
)
from tests.telemetry.records import EVALUATION, SAVE, STEP, TIMING
from tests.telemetry.tensorboard import read_events

DISK = Disk()


def opened(writer):
    """The writer, open."""
    writer.open()
    return writer


def no_warning(line: str) -> None:
    raise AssertionError(line)


def step(iteration: int, **changes: object):
    return replace(STEP, iteration=iteration, samples=iteration * 16, **changes)


def test_every_record_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    writer = opened(JsonLines(tmp_path / "run" / "metrics.jsonl", resumed_iteration=0, disk=DISK))
    for count, record in enumerate([step(1), EVALUATION, SAVE, TIMING], start=1):
        writer.write(record)
        assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == count
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [step(1), EVALUATION, SAVE, TIMING]


def test_resuming_drops_the_steps_that_are_made_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    first = opened(JsonLines(file, resumed_iteration=0, disk=DISK))
    for iteration in range(1, 8):
        first.write(step(iteration))
    first.close()
    with file.open("a") as torn:
        torn.write('{"kind": "train", "iterat')
    second = opened(JsonLines(file, resumed_iteration=4, disk=DISK))
    second.write(step(5, loss=1.0))
    second.close()
    assert read_metrics(file) == [step(1), step(2), step(3), step(4), step(5, loss=1.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_survives_what_a_power_failure_left(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(record_json(step(1)).encode() + b"\n" + b"\0" * 50 + b"\n[]\n\xff\n")
    opened(JsonLines(file, resumed_iteration=9, disk=DISK)).close()
    assert read_metrics(file) == [step(1)]


def test_a_fresh_run_begins_an_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(record_json(step(1)) + "\n")
    opened(JsonLines(file, resumed_iteration=0, disk=DISK)).close()
    assert read_metrics(file) == []


def test_a_folder_that_cannot_be_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        opened(JsonLines(tmp_path / "file" / "metrics.jsonl", resumed_iteration=0, disk=DISK))
    with pytest.raises(StorageError, match="file"):
        opened(TensorBoard(tmp_path / "file" / "tb", config=TelemetryConfig(), disk=DISK))


def test_tensorboard_reads_what_we_wrote(tmp_path: Path) -> None:
    writer = opened(TensorBoard(tmp_path, config=TelemetryConfig(), disk=DISK))
    writer.write(step(1, loss=10.0))
    writer.write(step(300, loss=2.5))
    writer.write(EVALUATION)
    writer.write(SAVE)
    writer.close()
    events = read_events(tmp_path)
    assert events["lm loss"] == [(1, 10.0), (300, 2.5)]
    assert events["lm loss vs samples"] == [(16, 10.0), (4800, 2.5)]
    assert events["lm loss test"] == [(5, 2.5)]
    assert events["lm loss test vs samples"] == [(80, 2.5)]
    assert events["learning-rate"][0] == (1, pytest.approx(2.2704e-05))
    names = {"learning-rate", "batch-size", "lm loss", "loss-scale", "grad-norm", "throughput",
             "tgs", "mfu", "lm loss test"}  # fmt: skip
    assert set(events) == names | {f"{name} vs samples" for name in names}


def test_nan_reaches_tensorboard(tmp_path: Path) -> None:
    writer = opened(TensorBoard(tmp_path, config=TelemetryConfig(), disk=DISK))
    writer.write(step(1, loss=math.nan))
    writer.close()
    assert math.isnan(read_events(tmp_path)["lm loss"][0][1])


def test_tensorboard_interval(tmp_path: Path) -> None:
    writer = opened(
        TensorBoard(tmp_path, config=TelemetryConfig(tensorboard_log_interval=2), disk=DISK)
    )
    for iteration in range(1, 5):
        writer.write(step(iteration))
    writer.close()
    assert [step for step, _ in read_events(tmp_path)["lm loss"]] == [2, 4]


@pytest.mark.parametrize(
    ("module", "config", "words"),
    [
        ("wandb", TelemetryConfig(wandb_project="p"), "--wandb-project p .*"),
        ("torch.utils.tensorboard", TelemetryConfig(tensorboard_dir="t"), "--tensorboard-dir t .*"),
    ],
)
def test_a_missing_package_names_flag_and_extra(
    tmp_path, monkeypatch, module, config, words
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=words + r"pip install -e '\.\["):
        open_writers(config, tmp_path, 0, warn=no_warning)


def test_switches_choose_the_scalars() -> None:
    everything = TelemetryConfig(
        log_timers_to_tensorboard=True,
        log_memory_to_tensorboard=True,
        log_world_size_to_tensorboard=True,
        log_validation_ppl_to_tensorboard=True,
    )
    nothing = TelemetryConfig(
        log_learning_rate_to_tensorboard=False,
        log_batch_size_to_tensorboard=False,
        log_loss_scale_to_tensorboard=False,
        log_throughput=False,
    )
    full = step(1, memory_bytes=7, num_zeros=3.0, params_norm=2.0, decoupled_learning_rate=5e-4)
    assert set(scalars(full, everything)) == {
        "learning-rate", "batch-size", "lm loss", "loss-scale", "world-size", "grad-norm",
        "num-zeros", "params-norm", "iteration-time", "throughput", "tgs", "mfu",
        "mem-max-allocated-bytes", "decoupled-learning-rate",
    }  # fmt: skip
    assert set(scalars(step(1), nothing)) == {"lm loss", "grad-norm"}
    assert scalars(EVALUATION, everything)["lm loss test ppl"] == EVALUATION.perplexity
    assert set(scalars(replace(EVALUATION, loss_name="loss"), everything)) == {"loss test"}
    metrics = {"accuracy": 0.25}
    assert scalars(step(1, metrics=metrics), nothing)["accuracy"] == 0.25
    assert scalars(replace(EVALUATION, metrics=metrics), nothing)["accuracy test"] == 0.25
    assert scalars(TIMING, everything) == {"optimizer-time": math.inf}
    assert scalars(TIMING, nothing) == {} == scalars(SAVE, everything)


class FakeRun:
    """What wandb.init returns, as far as we use it."""

    def __init__(self, settings: dict[str, object]) -> None:
        self.settings = settings
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, points: dict[str, float], step: int) -> None:
        self.logged.append((step, points))

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_the_same_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[FakeRun] = []

    def init(**settings: object) -> FakeRun:
        runs.append(FakeRun(settings))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = TelemetryConfig(wandb_project="p", wandb_exp_name="e")
    writers = open_writers(config, tmp_path, 0, warn=no_warning)
    writers.write(step(3))
    writers.write(SAVE)
    writers.close()
    (run,) = runs
    assert run.settings == {"project": "p", "name": "e", "entity": None, "dir": str(tmp_path)}
    expected = scalars(step(3), config) | {"samples": 48.0, "tokens": float(STEP.tokens)}
    assert run.logged == [(3, expected)]
    assert run.finished


def test_configuration_chooses_the_writers(tmp_path: Path) -> None:
    config = TelemetryConfig(tensorboard_dir=str(tmp_path / "tb"))
    silent = open_writers(config, tmp_path, 0, enabled=False, warn=no_warning)
    silent.write(step(1))
    silent.close()
    assert list(tmp_path.iterdir()) == []
    plain = open_writers(TelemetryConfig(), tmp_path, 0, warn=no_warning)
    assert [type(log.writer) for log in plain.writers] == [JsonLines]
    both = open_writers(config, tmp_path, 0, warn=no_warning)
    assert [type(log.writer) for log in both.writers] == [JsonLines, TensorBoard]
    plain.close()
    both.close()
