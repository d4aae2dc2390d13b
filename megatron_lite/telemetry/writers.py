"""Where records go: metrics.jsonl, TensorBoard, Weights & Biases, all behind one `write(record)`.

One rank writes; the others hold an empty `Writers`, so that no caller has to ask for its rank.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import types
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_lite.config.errors import ConfigError, StorageError
from megatron_lite.config.extras import how_to_install
from megatron_lite.config.sections.telemetry import TelemetryConfig
from megatron_lite.storage.disk import Disk, DiskFile, temporary_name
from megatron_lite.telemetry.lasting import Lasting, Writer
from megatron_lite.telemetry.record import (
    EvaluationRecord,
    RanksRecord,
    SaveRecord,
    StepRecord,
    TelemetryRecord,
    complete_lines,
    record_json,
)

METRICS_FILE = "metrics.jsonl"

EVERYTHING = sys.maxsize
"""A resumed_iteration that keeps every line there is."""

FLUSH_SECONDS = 10
"""TensorBoard sees a point at most this much later."""


class Writers:
    """Several logs as one, in their order; none at all on a rank that does not write."""

    def __init__(self, writers: Sequence[Lasting]) -> None:
        self.writers = tuple(writers)

    def write(self, record: TelemetryRecord) -> None:
        """Give the record to every log."""
        for writer in self.writers:
            writer.write(record)

    def close(self) -> None:
        """Close every log."""
        for writer in self.writers:
            writer.close()


class JsonLines:
    """metrics.jsonl: one line per record, on its way to the disk when `write` returns.

    On resume the lines after the resumed iteration belong to steps that will be made again and are
    dropped, and so is what a crash left unreadable.  A failed write may leave half a line: opened
    again, the file continues behind its last whole one.  Raises StorageError (exit 5).
    """

    def __init__(self, path: Path, *, resumed_iteration: int, disk: Disk) -> None:
        self.name = str(path)
        self._path, self._resumed, self._disk = path, resumed_iteration, disk
        self._file: DiskFile | None = None
        self._whole: int | None = None

    def open(self) -> None:
        """Begin the file with what is kept of an earlier run, or append to it."""
        if self._file is not None:
            with contextlib.suppress(StorageError):
                self._file.close()
            self._file = None
        if self._whole is not None:
            self._file = self._disk.reopen(self._path, self._whole)
            return
        kept = _lines_until(self._path, self._resumed)
        self._disk.make_folder(self._path.parent)
        temporary = temporary_name(self._path)
        try:
            file = self._disk.create(temporary)
            file.write("".join(f"{line}\n" for line in kept).encode())
            file.fsync()
            self._disk.rename(temporary, self._path)  # the open file keeps its new name
        except StorageError:
            with contextlib.suppress(StorageError):
                self._disk.remove(temporary)
            raise
        self._disk.sync_folder(self._path.parent)
        self._file, self._whole = file, file.size

    def write(self, record: TelemetryRecord) -> None:
        """Append one line."""
        assert self._file is not None, f"{self._path} is not open"
        self._file.write(f"{record_json(record)}\n".encode())
        self._whole = self._file.size

    def close(self) -> None:
        """Close the file, its bytes on the device."""
        if self._file is not None:
            self._file.fsync()
            self._file.close()


class TensorBoard:
    """Megatron-LM's scalars in an event file, through torch's SummaryWriter (extra tensorboard).

    Its thread writes when it likes and fails later, so the points since the last flush are kept:
    opened again, a new event file begins with them.
    """

    def __init__(self, folder: Path, *, config: TelemetryConfig, disk: Disk) -> None:
        self.name = f"--tensorboard-dir {folder}"
        self._folder, self._config, self._disk = folder, config, disk
        self._summary_writer = _package(
            "torch.utils.tensorboard", self.name, "tensorboard"
        ).SummaryWriter
        self._events: Any = None
        self._unflushed: deque[TelemetryRecord] = deque(
            maxlen=max(config.tensorboard_queue_size, 100)
        )

    def open(self) -> None:
        """Begin an event file."""
        self._disk.make_folder(self._folder)
        self._events = self._summary_writer(
            str(self._folder),
            max_queue=self._config.tensorboard_queue_size,
            flush_secs=FLUSH_SECONDS,
        )
        for record in self._unflushed:
            self._add(record)

    def write(self, record: TelemetryRecord) -> None:
        """Queue the record's points; training steps every --tensorboard-log-interval."""
        every = self._config.tensorboard_log_interval
        if isinstance(record, StepRecord) and record.iteration % every:
            return
        self._add(record)
        self._unflushed.append(record)
        if isinstance(record, EvaluationRecord):
            self._events.flush()
            self._unflushed.clear()

    def _add(self, record: TelemetryRecord) -> None:
        if isinstance(record, SaveRecord):
            return
        for name, value in scalars(record, self._config).items():
            self._events.add_scalar(name, value, record.iteration)
            self._events.add_scalar(f"{name} vs samples", value, record.samples)

    def close(self) -> None:
        """Write the queue and close."""
        self._events.close()


class WeightsAndBiases:
    """The same scalars in a W&B run, with samples and tokens to plot against.

    W&B reads WANDB_MODE itself: `offline` keeps everything in --wandb-save-dir.
    """

    def __init__(
        self, wandb: types.ModuleType, *, config: TelemetryConfig, fallback_folder: Path
    ) -> None:
        self.name = f"--wandb-project {config.wandb_project}"
        self._wandb, self._config, self._fallback = wandb, config, fallback_folder
        self._run: Any = None

    def open(self) -> None:
        """Begin a run, or resume it after a failure."""
        config = self._config
        known = getattr(self._run, "id", None)
        self._run = self._wandb.init(
            project=config.wandb_project,
            name=config.wandb_exp_name or None,
            entity=config.wandb_entity or None,
            dir=config.wandb_save_dir or str(self._fallback),
            **({"id": known, "resume": "allow"} if known else {}),
        )

    def write(self, record: TelemetryRecord) -> None:
        """Log the record's scalars at its iteration."""
        if isinstance(record, SaveRecord):
            return
        points = scalars(record, self._config)
        points["samples"] = float(record.samples)
        if isinstance(record, StepRecord):
            points["tokens"] = float(record.tokens)
        self._run.log(points, step=record.iteration)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_writers(
    config: TelemetryConfig,
    run_folder: Path,
    resumed_iteration: int,
    *,
    warn: Callable[[str], None],
    enabled: bool = True,
    disk: Disk | None = None,
) -> Writers:
    """The logs a configuration asks for; none where this rank is not the one that writes.

    resumed_iteration: 0 for a fresh run.  warn: told of every failure from now on.  Raises
    ConfigError for a missing package and StorageError for a folder that cannot be written.
    """
    if not enabled:
        return Writers(())
    disk = disk or Disk()
    project = config.wandb_project
    wandb = _package("wandb", f"--wandb-project {project}", "wandb") if project else None
    writers: list[Writer] = [
        JsonLines(run_folder / METRICS_FILE, resumed_iteration=resumed_iteration, disk=disk)
    ]
    if config.tensorboard_dir:
        writers.append(TensorBoard(Path(config.tensorboard_dir), config=config, disk=disk))
    if wandb is not None:
        writers.append(WeightsAndBiases(wandb, config=config, fallback_folder=run_folder))
    lasting = [Lasting(writer, warn) for writer in writers]
    for writer in lasting:
        writer.open()
    return Writers(lasting)


def _package(module: str, flag: str, extra: str) -> types.ModuleType:
    """An optional package, asked for before anything is written."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{flag} needs the package {extra}, which is not installed; "
            f"`{how_to_install(extra)}`, or leave the flag out"
        ) from error


def scalars(record: TelemetryRecord, config: TelemetryConfig) -> dict[str, float]:
    """Megatron-LM's scalar names of a record, as the switches of the configuration choose.

    Names beyond Megatron's, with `--log-throughput`: `tgs`, and `mfu` where the peak is known.
    """
    if isinstance(record, SaveRecord):
        return {}
    if isinstance(record, StepRecord):
        return _step_scalars(record, config)
    if isinstance(record, EvaluationRecord):
        name = f"{record.loss_name} {record.split}"
        points = {name: record.loss}
        if config.log_validation_ppl_to_tensorboard and record.perplexity is not None:
            points[f"{name} ppl"] = record.perplexity
        return points | {f"{n} {record.split}": value for n, value in record.metrics.items()}
    if isinstance(record, RanksRecord):
        name = record.what.replace(" ", "-")
        return {f"{name}-median": record.median, f"{name}-max": max(record.most.values())}
    if not config.log_timers_to_tensorboard:
        return {}
    return {f"{name}-time": seconds for name, seconds in record.largest.items()}


STEP_SCALARS = frozenset(
    (
        "learning-rate",
        "decoupled-learning-rate",
        "batch-size",
        "lm loss",
        "loss-scale",
        "world-size",
        "grad-norm",
        "num-zeros",
        "params-norm",
        "iteration-time",
        "throughput",
        "tgs",
        "mfu",
        "mem-max-allocated-bytes",
    )
)
"""What a step is told under besides an objective's metrics, which may not take these names."""


def _step_scalars(record: StepRecord, config: TelemetryConfig) -> dict[str, float]:
    throughput = config.log_throughput
    rates = config.log_learning_rate_to_tensorboard
    chosen: list[tuple[str, float | None, bool]] = [
        ("learning-rate", record.learning_rate, rates),
        ("decoupled-learning-rate", record.decoupled_learning_rate, rates),
        ("batch-size", record.global_batch_size, config.log_batch_size_to_tensorboard),
        (record.loss_name, record.loss, True),
        *((name, value, True) for name, value in record.metrics.items()),
        ("loss-scale", record.loss_scale, config.log_loss_scale_to_tensorboard),
        ("world-size", record.world_size, config.log_world_size_to_tensorboard),
        ("grad-norm", record.grad_norm, True),
        ("num-zeros", record.num_zeros, True),
        ("params-norm", record.params_norm, True),
        ("iteration-time", record.seconds_per_iteration, config.log_timers_to_tensorboard),
        ("throughput", record.tflops_per_gpu, throughput),
        ("tgs", record.tokens_per_second_per_gpu, throughput),
        ("mfu", record.mfu, throughput),
        ("mem-max-allocated-bytes", record.memory_bytes, config.log_memory_to_tensorboard),
    ]
    return {name: float(value) for name, value, on in chosen if on and value is not None}


def _lines_until(path: Path, iteration: int) -> list[str]:
    """The lines of a metrics file that belong to iterations up to this one."""
    if not path.exists():
        return []
    return [line for line in complete_lines(path) if 0 <= _iteration(line) <= iteration]


def _iteration(line: str) -> int:
    """-1 for a line that cannot be read: a power failure may leave anything behind."""
    try:
        value = json.loads(line)
    except ValueError:
        return -1
    iteration = value.get("iteration", -1) if isinstance(value, dict) else -1
    return iteration if isinstance(iteration, int) else -1
