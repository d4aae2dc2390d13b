"""Where records go: metrics.jsonl, TensorBoard, Weights & Biases, all behind one `write(record)`.

One rank writes; the others hold an empty `Writers`, so that nobody asks who they are.
"""

from __future__ import annotations

import importlib
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.telemetry import TelemetryConfig
from megatron_lite.storage.disk import Disk, DiskFile, temporary_name
from megatron_lite.telemetry.record import (
    EvaluationRecord,
    RanksRecord,
    Record,
    SaveRecord,
    StepRecord,
    complete_lines,
    to_json,
)

METRICS_FILE = "metrics.jsonl"

FLUSH_SECONDS = 10
"""TensorBoard sees a point at most this much later."""


class Writer(Protocol):
    """Takes every record of a run."""

    def write(self, record: Record) -> None:
        """Keep or pass on one record; cheap for a kind that does not concern it."""
        ...

    def close(self) -> None:
        """Write what is still held back."""
        ...


class Writers:
    """Several writers as one, in their order; none at all on a rank that does not write."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = tuple(writers)

    def write(self, record: Record) -> None:
        """Give the record to every writer."""
        for writer in self.writers:
            writer.write(record)

    def close(self) -> None:
        """Close every writer."""
        for writer in self.writers:
            writer.close()


class JsonLines:
    """metrics.jsonl: one line per record, on its way to the disk when `write` returns.

    On resume the lines after the resumed iteration belong to steps that will be made again and are
    dropped, and so is what a crash left unreadable.  Raises StorageError (exit 5).
    """

    def __init__(self, path: Path, *, resumed_iteration: int, disk: Disk) -> None:
        kept = _lines_until(path, resumed_iteration)
        disk.make_folder(path.parent)
        temporary = temporary_name(path)
        self._file: DiskFile = disk.create(temporary)
        self._file.write("".join(f"{line}\n" for line in kept).encode())
        self._file.fsync()
        disk.rename(temporary, path)  # the open file keeps its new name: appending goes on
        disk.sync_folder(path.parent)

    def write(self, record: Record) -> None:
        """Append one line."""
        self._file.write(f"{to_json(record)}\n".encode())

    def close(self) -> None:
        """Close the file, its bytes on the device."""
        self._file.fsync()
        self._file.close()


class TensorBoard:
    """Megatron-LM's scalars in an event file, through torch's SummaryWriter (extra tensorboard)."""

    def __init__(self, folder: Path, *, config: TelemetryConfig, disk: Disk) -> None:
        self._config = config
        summary_writer = _package(
            "torch.utils.tensorboard", f"--tensorboard-dir {folder}", "tensorboard"
        ).SummaryWriter
        disk.make_folder(folder)
        self._events: Any = summary_writer(
            str(folder), max_queue=config.tensorboard_queue_size, flush_secs=FLUSH_SECONDS
        )

    def write(self, record: Record) -> None:
        """Queue the record's points; training steps every --tensorboard-log-interval."""
        if isinstance(record, SaveRecord):
            return
        if (
            isinstance(record, StepRecord)
            and record.iteration % self._config.tensorboard_log_interval
        ):
            return
        points = scalars(record, self._config)
        if not points:
            return
        for name, value in points.items():
            self._events.add_scalar(name, value, record.iteration)
            self._events.add_scalar(f"{name} vs samples", value, record.samples)
        if isinstance(record, EvaluationRecord):
            self._events.flush()

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
        self._config = config
        self._run: Any = wandb.init(
            project=config.wandb_project,
            name=config.wandb_exp_name or None,
            entity=config.wandb_entity or None,
            dir=config.wandb_save_dir or str(fallback_folder),
        )

    def write(self, record: Record) -> None:
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
    enabled: bool = True,
    disk: Disk | None = None,
) -> Writers:
    """The writers a configuration asks for; none where this rank is not the one that writes.

    resumed_iteration: 0 for a fresh run.  Raises ConfigError for a missing package and
    StorageError for a folder that cannot be written.
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
    return Writers(writers)


def _package(module: str, flag: str, extra: str) -> types.ModuleType:
    """An optional package, asked for before anything is written."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{flag} needs the package {extra}, which is not installed; "
            f"`pip install 'megatron_lite[{extra}]'`, or leave the flag out"
        ) from error


def scalars(record: Record, config: TelemetryConfig) -> dict[str, float]:
    """Megatron-LM's scalar names of a record, as the switches of the configuration choose.

    Ours beside Megatron's, with `--log-throughput`: `tgs`, and `mfu` where the peak is known.
    """
    if isinstance(record, SaveRecord):
        return {}
    if isinstance(record, StepRecord):
        return _step_scalars(record, config)
    if isinstance(record, EvaluationRecord):
        points = {f"lm loss {record.split}": record.loss}
        if config.log_validation_ppl_to_tensorboard:
            points[f"lm loss {record.split} ppl"] = record.perplexity
        return points
    if isinstance(record, RanksRecord):
        name = record.what.replace(" ", "-")
        return {f"{name}-median": record.median, f"{name}-max": max(record.most.values())}
    if not config.log_timers_to_tensorboard:
        return {}
    return {f"{name}-time": seconds for name, seconds in record.largest.items()}


def _step_scalars(record: StepRecord, config: TelemetryConfig) -> dict[str, float]:
    throughput = config.log_throughput
    chosen: list[tuple[str, float | None, bool]] = [
        ("learning-rate", record.learning_rate, config.log_learning_rate_to_tensorboard),
        ("batch-size", record.global_batch_size, config.log_batch_size_to_tensorboard),
        ("lm loss", record.loss, True),
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
