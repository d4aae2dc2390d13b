"""Records as the lines people and scripts read; pure functions, fixed to the byte by tests.

A file or a pipe gets Megatron's lines, a terminal the same numbers shorter (--log-format).  The long
training line is Megatron-DeepSpeed's, field for field and in order, so that parsers of its
logs keep working; MFU is added at the end.  TFLOPs counts the full attention square and no
recompute.  Unlike its model the loss is always there, also when it is nan.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from megatron_lite.telemetry.ranks import format_ranks
from megatron_lite.telemetry.record import (
    EvaluationRecord,
    RanksRecord,
    SaveRecord,
    StepRecord,
    TelemetryRecord,
    record_json,
)
from megatron_lite.telemetry.timers import format_times

LineForm: TypeAlias = Literal["megatron", "short", "json"]


def format_line(record: StepRecord) -> str:
    """` iteration        1/     100 | consumed samples: ... | MFU: 41.20% |`, without a newline."""
    parts = [
        f" iteration {record.iteration:8d}/{record.train_iters:8d}",
        f" consumed samples: {record.samples:12d}",
        f" consumed tokens: {record.tokens:12d}",
        f" elapsed time per iteration (ms): {record.seconds_per_iteration * 1000.0:.1f}",
        f" learning rate: {record.learning_rate:.3E}",
    ]
    if record.decoupled_learning_rate is not None:
        parts.append(f" decoupled learning rate: {record.decoupled_learning_rate:.3E}")
    parts += [
        f" global batch size: {record.global_batch_size:5d}",
        f" {record.loss_name}: {_scientific(record.loss)}",
        *(f" {name}: {_scientific(value)}" for name, value in record.metrics.items()),
        f" loss scale: {record.loss_scale:.1f}",
    ]
    if record.grad_norm is not None:
        parts.append(f" grad norm: {record.grad_norm:.3f}")
    if record.num_zeros is not None:
        parts.append(f" num zeros: {record.num_zeros:.1f}")
    if record.params_norm is not None:
        parts.append(f" params norm: {record.params_norm:.3f}")
    parts += [
        f" actual seqlen: {record.seq_length:5d}",
        f" number of skipped iterations: {record.skipped_iterations:3d}",
        f" number of nan iterations: {record.nan_iterations:3d}",
        f" samples per second: {record.samples_per_second:.3f}",
        f" tokens per gpu per second (tgs): {record.tokens_per_second_per_gpu:.3f}",
        f" TFLOPs: {record.tflops_per_gpu:.2f}",
        f" MFU: {'-' if record.mfu is None else f'{100.0 * record.mfu:.2f}%'}",
    ]
    return " |".join(parts) + " |"


def format_evaluation(record: EvaluationRecord) -> str:
    """Loss, perplexity where there is one, and metrics between two rows of dashes; three lines."""
    where = f"iteration {record.iteration}"
    if record.final or record.split == "test":
        where += f" on {record.split} set"
    name, perplexity = record.loss_name, record.perplexity
    line = f" validation loss at {where} | {name} value: {_scientific(record.loss)} | "
    if perplexity is not None:
        line += f"{name} PPL: {_scientific(perplexity)} | "
    line += "".join(f"{name} value: {_scientific(v)} | " for name, v in record.metrics.items())
    dashes = "-" * (len(line) + 1)
    return f"{dashes}\n{line}\n{dashes}"


def format_save(record: SaveRecord) -> str:
    """`  successfully saved checkpoint from iteration     100 to FOLDER | 1.500 GB in 2.00 s |`."""
    where = f" to {record.folder}" if record.folder else ""
    stalled = record.stalled_seconds
    stall = "" if stalled is None else f" training stood still {stalled:.2f} s |"
    big = record.bytes >= 10**9
    size = f"{record.bytes / 1e9:.3f} GB" if big else f"{record.bytes / 1e6:.3f} MB"
    return (
        f"  successfully saved checkpoint from iteration {record.iteration:7d}{where}"
        f" | {size} in {record.seconds:.2f} s |{stall}"
    )


def short_line(record: StepRecord) -> str:
    """`   100/500000 | loss 3.2142 | lr 6.000E-05 | grad norm 0.521 | ... | ETA 3 h 12 min`."""
    width = len(str(record.train_iters))
    parts = [
        f" {record.iteration:{width}d}/{record.train_iters}",
        f"loss {record.loss:.4f}",
        *(f"{name} {value:.4f}" for name, value in record.metrics.items()),
        f"lr {record.learning_rate:.3E}",
    ]
    if record.decoupled_learning_rate is not None:
        parts.append(f"decoupled lr {record.decoupled_learning_rate:.3E}")
    if record.grad_norm is not None:
        parts.append(f"grad norm {record.grad_norm:.3f}")
    if record.loss_scale != 1.0:
        parts.append(f"scale {record.loss_scale:.0f}")
    parts.append(f"batch {record.global_batch_size}")
    parts.append(f"{record.seconds_per_iteration * 1000.0:.1f} ms")
    parts.append(f"{record.tokens_per_second_per_gpu:,.0f} tokens/s/rank")
    mfu = record.mfu
    parts.append(f"{record.tflops_per_gpu:.2f} TFLOPs" if mfu is None else f"MFU {mfu:.2%}")
    if record.skipped_iterations:
        parts.append(f"{record.skipped_iterations} skipped")
    if record.nan_iterations:
        parts.append(f"{record.nan_iterations} NaN")
    if record.eta_seconds:
        parts.append(f"ETA {duration(record.eta_seconds)}")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `3 h 12 min`, `12 d 4 h`; `-` where it is not known."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    for size, name, smaller, small in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // smaller} {small}"
    return f"{whole} s"


def short_evaluation(record: EvaluationRecord) -> str:
    """` final test at iteration 100 | loss 3.2142 | PPL 24.88 | 12.3 s`."""
    which = f"final {record.split}" if record.final else record.split
    metrics = "".join(f"| {name} {value:.4f} " for name, value in record.metrics.items())
    ppl = "" if record.perplexity is None else f"| PPL {record.perplexity:.2f} "
    return (
        f" {which} at iteration {record.iteration} | loss {record.loss:.4f} "
        f"{ppl}{metrics}| {record.seconds:.1f} s"
    )


def format_record(record: TelemetryRecord, form: LineForm = "megatron") -> str:
    """Whichever of the forms belongs to the record."""
    if form == "json":
        return record_json(record)
    short = form == "short"
    if isinstance(record, StepRecord):
        return short_line(record) if short else format_line(record)
    if isinstance(record, EvaluationRecord):
        return short_evaluation(record) if short else format_evaluation(record)
    if isinstance(record, SaveRecord):
        return format_save(record)
    if isinstance(record, RanksRecord):
        return format_ranks(record)
    return format_times([record.smallest, record.largest], option="minmax")


def _scientific(value: float) -> str:
    return f"{value:.6E}" if math.isfinite(value) else f"{value}"
