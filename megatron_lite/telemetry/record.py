"""One typed record per event: the source of the console line, TensorBoard, W&B and metrics.jsonl.

    {"kind": "train", "iteration": 100, "loss": 3.21, ...}          every optimizer step
    {"kind": "evaluation", "iteration": 100, "split": "validation", ...}
    {"kind": "save", "iteration": 100, "bytes": 1234, ...}
    {"kind": "ranks", "iteration": 100, "what": "memory", "most": {"3": 81.0e9}, ...}
    {"kind": "timing", "iteration": 100, "largest": {"optimizer": 0.01}, ...}

JSON has no NaN: a float that is not finite is written as the string "NaN", "Infinity" or
"-Infinity", so every line stays valid JSON; `read_metrics` turns it back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from megatron_lite.config.errors import DataError
from megatron_lite.config.objectives import LM_LOSS
from megatron_lite.storage.reading import open_plain

LARGEST_EXPONENT = 20.0
"""Perplexity is exp(min(20, loss)), as Megatron caps it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step, or the mean over the steps of one log interval."""

    kind: ClassVar[str] = "train"

    iteration: int
    """Steps taken, skipped ones included; the first step's record says 1."""

    train_iters: int
    """Steps the run will take."""

    samples: int
    """Samples consumed since the beginning of the training, over all resumes."""

    tokens: int
    """Tokens consumed since the beginning of the training."""

    seconds_per_iteration: float
    """Mean wall time of a step, without evaluation, saving and (where there are others) warm-up."""

    learning_rate: float
    """Value after the step, as Megatron logs it: lr(samples of successful steps)."""

    decoupled_learning_rate: float | None = None
    """Of the token embedding and the output layer after the step (--decoupled-lr); None: no other."""

    weight_decay: float
    """Weight decay after the step."""

    global_batch_size: int
    """Samples of the last step."""

    loss: float
    """Mean loss of the steps that advanced; NaN stays NaN."""

    loss_name: str = LM_LOSS
    """What the objective calls it; no entry in the file where it is the usual one."""

    metrics: dict[str, float] = field(default_factory=dict)
    """The objective's numbers beside the loss, likewise; no entry in the file where it has none."""

    loss_scale: float
    """fp16 loss scale; 1.0 otherwise."""

    grad_norm: float | None
    """Global gradient norm before clipping; None where it is not known."""

    num_zeros: float | None = None
    """Gradient elements that are zero (--log-num-zeros-in-grad)."""

    params_norm: float | None = None
    """Global norm of the parameters (--log-params-norm)."""

    seq_length: int
    """Tokens per sample."""

    skipped_iterations: int
    """Steps of the interval without an update (fp16 overflow)."""

    nan_iterations: int
    """Steps of the interval with a loss that is not finite."""

    samples_per_second: float
    """Samples of the interval / its time, over all ranks."""

    tokens_per_second_per_gpu: float
    """TGS: tokens of the interval / its time / world size."""

    tflops_per_gpu: float
    """TGS * FLOPs per token, attention counted as a full square, no recompute factor."""

    tflops_causal: float
    """The same with only the causal half of the attention counted (Megatron-LM since 2025)."""

    mfu: float | None
    """tflops_per_gpu / the device's dense bf16 peak; None where the peak is not known."""

    data_seconds: float
    """Mean wait for data per step."""

    memory_bytes: int | None = None
    """Most device memory allocated so far on this rank; None without an accelerator."""

    world_size: int
    """Ranks of the run."""

    eta_seconds: float
    """Steps left * seconds_per_iteration."""

    warmup: bool = False
    """The times include the first step of this process, which compiles and fills caches."""

    timestamp: float = 0.0
    """Seconds since 1970 when the record was made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """Mean loss over --eval-iters batches of one split."""

    kind: ClassVar[str] = "evaluation"

    iteration: int
    split: Literal["validation", "test"]
    samples: int
    """Training samples consumed so far (the x axis of " vs samples")."""

    loss: float
    loss_name: str = LM_LOSS
    metrics: dict[str, float] = field(default_factory=dict)
    """The objective's numbers beside the loss over the same batches."""

    perplexity: float | None = field(init=False)
    """exp(min(20, loss)); None where the loss is no language model's."""

    seconds: float
    final: bool = False
    """Made after the end of the training."""

    alone: bool = False
    """Made by a start that only evaluated (--skip-train): no point of a training's curve."""

    timestamp: float = 0.0

    def __post_init__(self) -> None:
        capped = min(self.loss, LARGEST_EXPONENT)  # this order keeps NaN
        found = math.exp(capped) if self.loss_name == LM_LOSS else None
        object.__setattr__(self, "perplexity", found)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRecord:
    """One checkpoint that is complete."""

    kind: ClassVar[str] = "save"

    iteration: int
    bytes: int
    seconds: float
    """From the step it belongs to until it is complete."""

    folder: str = ""
    stalled_seconds: float | None = None
    """How long training stood still for it; None in records of older versions."""

    timestamp: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingRecord:
    """Seconds per iteration of the named spans of one log interval (--timing-log-level)."""

    kind: ClassVar[str] = "timing"

    iteration: int
    samples: int
    smallest: dict[str, float]
    """Least over the ranks that measured the span."""

    largest: dict[str, float]
    """Most over them."""

    timestamp: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksRecord:
    """One value of every rank: own seconds per iteration (--log-straggler), bytes (--log-memory-interval)."""

    kind: ClassVar[str] = "ranks"

    what: Literal["own time", "memory"]
    iteration: int
    samples: int
    median: float
    """Low median over the ranks."""

    most: dict[str, float]
    """Rank -> value of those with the largest, largest first."""

    least: dict[str, float]
    """Of those with the smallest, smallest first."""

    ranks: int
    """How many there are."""

    timestamp: float = 0.0


TelemetryRecord: TypeAlias = StepRecord | EvaluationRecord | SaveRecord | TimingRecord | RanksRecord

RECORDS: Mapping[str, type[TelemetryRecord]] = {
    "train": StepRecord,
    "evaluation": EvaluationRecord,
    "save": SaveRecord,
    "timing": TimingRecord,
    "ranks": RanksRecord,
}


_UNUSUAL: Mapping[str, object] = {"metrics": {}, "loss_name": LM_LOSS}
"""Entries that are left out where they say this."""


def record_json(record: TelemetryRecord) -> str:
    """One line of metrics.jsonl without its newline; strict JSON even for NaN and infinity."""
    values: dict[str, Any] = {"kind": record.kind}
    for entry in fields(record):
        value = getattr(record, entry.name)
        if entry.name not in _UNUSUAL or value != _UNUSUAL[entry.name]:
            values[entry.name] = as_json(value)
    return json.dumps(values, allow_nan=False)


def from_json(line: str) -> TelemetryRecord:
    """The record a line was made of; ValueError says what is wrong with the line."""
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError(f"a record is an object, not {type(values).__name__}")
    kind = values.pop("kind", None)
    if kind not in RECORDS:
        raise ValueError(f"kind is {kind!r}; known are {', '.join(RECORDS)}")
    record_type = RECORDS[kind]
    known = {entry.name: entry for entry in fields(record_type)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"a {kind} record has no {', '.join(unknown)}")
    chosen = {
        name: _decode(value, str(known[name].type))
        for name, value in values.items()
        if known[name].init
    }
    try:
        return record_type(**chosen)
    except TypeError as error:
        raise ValueError(f"{error}") from error


def read_metrics(path: str | os.PathLike[str]) -> list[TelemetryRecord]:
    """All records of a metrics.jsonl, in order; a last line cut off by a crash is left out.

    Raises DataError naming file and line for anything else that is not a record.
    """
    file = Path(path)
    records: list[TelemetryRecord] = []
    for number, line in enumerate(complete_lines(file), start=1):
        try:
            records.append(from_json(line))
        except ValueError as error:
            raise DataError(
                f"{file}, line {number}: {error} - remove the line or take the file of another run"
            ) from error
    return records


def complete_lines(path: Path) -> list[str]:
    """The lines that end with a newline; what a killed process left behind them is dropped."""
    try:
        with open_plain(path) as file:
            text = file.read().decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror} - give a run folder whose training has started"
        ) from error
    return text.split("\n")[:-1]


def as_json(value: object) -> object:
    """The same in JSON's words: a number that is not finite is a string, see the head of this file."""
    if isinstance(value, Mapping):
        return {str(name): as_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any, type_name: str) -> Any:
    """Undo `as_json` and say so when the JSON type does not fit the field."""
    if type_name == "dict[str, float]" and isinstance(value, dict):
        return {name: _decode(entry, "float") for name, entry in value.items()}
    allowed = {part.strip() for part in type_name.split("|")}
    if "float" in allowed:
        if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
            return float(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    names = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}
    fits = any(type(value) is names[part] for part in allowed if part in names)
    if fits or (isinstance(value, str) and type_name.startswith("Literal")):
        return value
    raise ValueError(f"{value!r} where a value of type {type_name} belongs")
