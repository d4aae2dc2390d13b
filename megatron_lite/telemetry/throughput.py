"""Steps added up over a log interval: samples/s, TGS, TFLOP/s, MFU and the time left.

    TGS    = tokens of the interval / its seconds / world size
    TFLOPs = TGS * FLOPs per token / 1e12        full attention square, no recompute factor
    MFU    = TFLOPs / dense bf16 peak of the device

Only time inside steps counts: evaluation and saving happen outside, so they never slow down the
rates of the interval they fall into.  The first step of a process compiles kernels and fills
caches; it counts only where the interval holds nothing else, and the record says so (`warmup`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_lite.config.objectives import LM_LOSS
from megatron_lite.telemetry.record import StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What the trainer knows after one optimizer step; plain numbers of this moment."""

    iteration: int
    samples: int
    """Samples consumed since the beginning of the training, this step included."""

    tokens: int
    """Tokens consumed since the beginning of the training, this step included."""

    global_batch_size: int
    """Samples of this step."""

    seq_length: int
    seconds: float
    """Wall time of this step, the wait for its data included, evaluation and saving not."""

    data_seconds: float
    """Wait for data inside `seconds`."""

    loss: float
    learning_rate: float
    weight_decay: float
    decoupled_learning_rate: float | None = None
    loss_scale: float = 1.0
    grad_norm: float | None = None
    num_zeros: float | None = None
    params_norm: float | None = None
    skipped: bool = False
    memory_bytes: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class IntervalMeter:
    """Collects the steps of one log interval and makes records of them.

    `add` returns the record of the single step (for metrics.jsonl and TensorBoard), `take` the
    record of the interval since the last `take` (for the console line).
    """

    train_iters: int
    train_samples: int
    """Samples of the whole run: what is left of them, not of the steps, takes the time left."""

    world_size: int
    flops_per_token: float
    """Forward and backward, full attention square."""

    causal_flops_per_token: float
    """The same with the causal half of the attention."""

    peak_tflops: float | None = None
    loss_name: str = LM_LOSS
    clock: Callable[[], float] = time.time
    _steps: list[Step] = field(default_factory=list)
    _first_iteration: int | None = None

    def add(self, step: Step) -> StepRecord:
        """Count one step; returns its own record."""
        if self._first_iteration is None:
            self._first_iteration = step.iteration
        self._steps.append(step)
        return self._record([step])

    def take(self) -> StepRecord:
        """The record of all steps since the last call; there must be one."""
        assert self._steps, "no step since the last record"
        record = self._record(self._steps)
        self._steps = []
        return record

    @property
    def is_empty(self) -> bool:
        """No step since the last `take`: there is no line to print."""
        return not self._steps

    def _record(self, steps: Sequence[Step]) -> StepRecord:
        last = steps[-1]
        steady = [step for step in steps if step.iteration != self._first_iteration]
        timed = steady or steps
        seconds = sum(step.seconds for step in timed)
        samples = sum(step.global_batch_size for step in timed)
        tokens = sum(step.global_batch_size * step.seq_length for step in timed)
        tgs = _rate(tokens, seconds) / self.world_size
        tflops = tgs * self.flops_per_token / 1e12
        per_iteration = seconds / len(timed)
        return StepRecord(
            iteration=last.iteration,
            train_iters=self.train_iters,
            samples=last.samples,
            tokens=last.tokens,
            seconds_per_iteration=per_iteration,
            learning_rate=last.learning_rate,
            decoupled_learning_rate=last.decoupled_learning_rate,
            weight_decay=last.weight_decay,
            global_batch_size=last.global_batch_size,
            loss=_mean_loss(steps),
            loss_name=self.loss_name,
            metrics=_mean_metrics(steps),
            loss_scale=last.loss_scale,
            grad_norm=last.grad_norm,
            num_zeros=last.num_zeros,
            params_norm=last.params_norm,
            seq_length=last.seq_length,
            skipped_iterations=sum(step.skipped for step in steps),
            nan_iterations=sum(not math.isfinite(step.loss) for step in steps),
            samples_per_second=_rate(samples, seconds),
            tokens_per_second_per_gpu=tgs,
            tflops_per_gpu=tflops,
            tflops_causal=tgs * self.causal_flops_per_token / 1e12,
            mfu=None if self.peak_tflops is None else tflops / self.peak_tflops,
            data_seconds=sum(step.data_seconds for step in timed) / len(timed),
            memory_bytes=last.memory_bytes,
            world_size=self.world_size,
            eta_seconds=max(0, self.train_samples - last.samples) * seconds / max(samples, 1),
            warmup=not steady,
            timestamp=self.clock(),
        )


def _mean_loss(steps: Sequence[Step]) -> float:
    """Mean over the steps that advanced; where all were skipped, over those: a loss they had."""
    losses = [step.loss for step in _advanced(steps)]
    return sum(losses) / len(losses)


def _mean_metrics(steps: Sequence[Step]) -> dict[str, float]:
    """Of the same steps; one that was not measured in each is the mean over those that have it."""
    found: dict[str, list[float]] = {}
    for step in _advanced(steps):
        for name, value in step.metrics.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _advanced(steps: Sequence[Step]) -> Sequence[Step]:
    return [step for step in steps if not step.skipped] or steps


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0.0 else math.nan
