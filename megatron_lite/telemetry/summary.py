"""A run's records in a few numbers: how fast it was, where the loss ended."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lite.config.errors import DataError
from megatron_lite.telemetry.record import EvaluationRecord, StepRecord, TelemetryRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens per second and GPU over the steady steps of a run."""

    steps: int
    left_out: int
    """Warm-up steps: the first of each process."""

    skipped: int
    """Steps without an update, which are left out, too: they cost less than a step."""

    mean: float
    """Tokens of all steady steps / their time / world size."""

    median: float
    smallest: float
    largest: float
    seconds_per_iteration: float
    tflops_per_gpu: float
    tflops_causal: float
    mfu: float | None
    world_size: int

    def __str__(self) -> str:
        mfu = "-" if self.mfu is None else f"{100.0 * self.mfu:.2f}%"
        return (
            f"tokens per gpu per second (tgs): mean {self.mean:.3f} | median {self.median:.3f}"
            f" | min {self.smallest:.3f} | max {self.largest:.3f}\n"
            f"  over {self.steps} steps on {self.world_size} ranks"
            f" (without {self.left_out} of warm-up{f', {self.skipped} skipped' if self.skipped else ''})"
            f" | elapsed time per iteration (ms): {1000.0 * self.seconds_per_iteration:.1f}"
            f" | TFLOPs: {self.tflops_per_gpu:.2f} (causal {self.tflops_causal:.2f}) | MFU: {mfu}"
        )


def train_records(records: Sequence[TelemetryRecord]) -> list[StepRecord]:
    """The optimizer steps among the records."""
    return [record for record in records if isinstance(record, StepRecord)]


def evaluation_records(
    records: Sequence[TelemetryRecord], split: str, *, alone: bool = False
) -> list[EvaluationRecord]:
    """The evaluations of one split that the training made, or those of starts that only evaluated."""
    return [
        record
        for record in records
        if isinstance(record, EvaluationRecord) and (record.split, record.alone) == (split, alone)
    ]


def measure_speed(records: Sequence[TelemetryRecord], *, source: str) -> Speed:
    """Speed of the steps after warm-up, on the number of ranks the last step had.

    Raises DataError naming the source where there is no such step.
    """
    steps = train_records(records)
    ranks = steps[-1].world_size if steps else 0
    steady = [
        step
        for step in steps
        if not step.warmup
        and not step.skipped_iterations
        and step.world_size == ranks
        and math.isfinite(step.tokens_per_second_per_gpu)
    ]
    if steps and all(step.skipped_iterations for step in steps):
        raise DataError(f"{source}: {_never_ran(steps)}")
    if not steady:
        raise DataError(
            f"{source} has {len(steps)} steps and none after the warm-up step; "
            f"run at least 2 iterations"
        )
    seconds = sum(step.seconds_per_iteration for step in steady)
    rates = [step.tokens_per_second_per_gpu for step in steady]

    def over_time(values: Sequence[float]) -> float:
        weighted = zip(values, steady, strict=True)
        return sum(value * step.seconds_per_iteration for value, step in weighted) / seconds

    utilization = [step.mfu for step in steady if step.mfu is not None]
    return Speed(
        steps=len(steady),
        left_out=sum(step.warmup for step in steps),
        skipped=sum(
            step.skipped_iterations > 0
            for step in steps
            if step.world_size == ranks and not step.warmup
        ),
        mean=over_time(rates),
        median=statistics.median(rates),
        smallest=min(rates),
        largest=max(rates),
        seconds_per_iteration=seconds / len(steady),
        tflops_per_gpu=over_time([step.tflops_per_gpu for step in steady]),
        tflops_causal=over_time([step.tflops_causal for step in steady]),
        mfu=over_time(utilization) if len(utilization) == len(steady) else None,
        world_size=ranks,
    )


def describe_losses(records: Sequence[TelemetryRecord]) -> list[str]:
    """First and last training loss, best and last validation loss, test loss with perplexity."""
    steps = train_records(records)
    looked = [
        f"evaluated alone at iteration {record.iteration}: {split} loss {_with_perplexity(record)}"
        for split in ("validation", "test")
        for record in evaluation_records(records, split, alone=True)
    ]
    if not steps:
        return [*looked, "no optimizer step here"] if looked else ["no optimizer step yet"]
    first, last = steps[0], steps[-1]
    lines = [
        f"iterations {first.iteration} to {last.iteration} of {last.train_iters}, "
        f"{last.samples} samples, {last.tokens} tokens",
        f"training loss {first.loss:.4f} -> {last.loss:.4f}",
    ]
    validation = evaluation_records(records, "validation")
    if validation:
        best = min(validation, key=lambda record: record.loss)
        end = validation[-1]
        lines.append(
            f"validation loss {_with_perplexity(end)} at iteration "
            f"{end.iteration}; best {best.loss:.4f} at {best.iteration}"
        )
    test = evaluation_records(records, "test")
    if test:
        lines.append(f"test loss {_with_perplexity(test[-1])}")
    skipped = sum(step.skipped_iterations for step in steps)
    if all(step.skipped_iterations for step in steps):
        lines.append(f"*** {_never_ran(steps)} ***")
    elif skipped:
        lines.append(f"{skipped} steps were skipped")
    return [*lines, *looked]


def _with_perplexity(record: EvaluationRecord) -> str:
    """`3.2142 (PPL 24.88)`; the loss alone where it is no language model's."""
    ppl = "" if record.perplexity is None else f" (PPL {record.perplexity:.2f})"
    return f"{record.loss:.4f}{ppl}"


def _never_ran(steps: Sequence[StepRecord]) -> str:
    return never_ran(len(steps), steps[0].loss_scale, steps[-1].loss_scale)


def never_ran(steps: int, first_scale: float, last_scale: float) -> str:
    """What to say where every step was skipped; scales: fp16's at first and at last."""
    told = f"NO OPTIMIZER STEP RAN: all {steps} steps were skipped"
    useless = "their speed is none of training, their loss that of the weights at the start"
    if first_scale == last_scale == 1.0:  # not fp16, as far as records tell
        return f"{told}; {useless} - the warnings of the steps say why and what to do"
    return (
        f"{told}, at a loss scale from {first_scale:g} to {last_scale:g}; {useless} - begin at "
        f"--initial-loss-scale {min(65536.0, last_scale):.0f} (a fixed --loss-scale: lower it), run "
        "more iterations, or train in --bf16"
    )


def smoothed(values: Sequence[float], *, window: int) -> list[float]:
    """Mean over the finite values of the window around each point, narrower at both ends.

    The window always reaches equally far to both sides, so that a curve that falls is not moved.
    """
    means = []
    for middle in range(len(values)):
        reach = min(window // 2, middle, len(values) - 1 - middle)
        near = values[middle - reach : middle + reach + 1]
        finite = [value for value in near if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means
