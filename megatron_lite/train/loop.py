"""fit: step after step, with logging, evaluation, checkpoints and stopping in between."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass, field
from typing import Any

from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.store import Store
from megatron_lite.config.checkpoint import CheckpointConfig
from megatron_lite.config.errors import NumericsError
from megatron_lite.config.telemetry import TelemetryConfig
from megatron_lite.config.train import TrainConfig
from megatron_lite.data.loader import Loader
from megatron_lite.optim.learning_rate import LearningRateSchedule, WeightDecaySchedule
from megatron_lite.parallel.shard import weight_slices
from megatron_lite.telemetry.record import EvaluationRecord, SaveRecord
from megatron_lite.telemetry.throughput import IntervalMeter, Step
from megatron_lite.train.assemble import Run
from megatron_lite.train.device import peak_memory_bytes
from megatron_lite.train.log import Log
from megatron_lite.train.profile import Profiler
from megatron_lite.train.step import StepResult, evaluation_step, train_step
from megatron_lite.train.stop import Reason, StopRequests


@dataclass(frozen=True, slots=True)
class Loaders:
    """This dp rank's readers; None where a split is not read."""

    train: Loader | None
    valid: Loader | None
    test: Loader | None

    def close(self) -> None:
        """Stop their threads."""
        for loader in (self.train, self.valid, self.test):
            if loader is not None:
                loader.close()


@dataclass(slots=True)
class Session:
    """A Run and everything around its steps.  Every rank carries out the same session."""

    run: Run
    train: TrainConfig
    telemetry: TelemetryConfig
    checkpoint: CheckpointConfig
    loaders: Loaders
    learning_rate: LearningRateSchedule
    weight_decay: WeightDecaySchedule
    log: Log
    meter: IntervalMeter
    stop: StopRequests
    profiler: Profiler
    store: Store | None
    plain_config: dict[str, Any]
    train_iters: int
    seq_length: int
    saved_at: int = field(init=False)
    progress: Progress = field(init=False)
    first_step: int = field(init=False)

    def __post_init__(self) -> None:
        self.progress = self.run.progress
        self.first_step = self.saved_at = self.progress.step

    def fit(self) -> Reason:
        """Train until the end or until somebody asks for a stop; returns why it ended."""
        progress = self.progress
        if self.train.manual_gc:
            gc.disable()
            gc.collect()
        reason: Reason | None = self.stop.reason(
            progress.step, agreed=False, finished=self._finished()
        )
        while reason != "finished":
            self.profiler.before(progress.step + 1)
            agreed = self._step()
            self.profiler.after(progress.step)
            finished = self._finished()
            reason = self.stop.reason(progress.step, agreed=agreed, finished=finished)
            self._log_interval(last=reason is not None)
            every = self.train.eval_interval
            if every and self.train.eval_iters and progress.step % every == 0:
                self.evaluate("validation", final=False)
            every = self.checkpoint.save_interval
            if every and progress.step % every == 0:
                self.save()
            every = self.train.manual_gc_interval
            if self.train.manual_gc and every and progress.step % every == 0:
                gc.collect()
            if reason is not None:
                break
        if self.saved_at != progress.step and progress.step > 0:
            self.save()
        return reason or "finished"

    def _finished(self) -> bool:
        by_samples = self.train.train_samples
        if by_samples is not None:
            return self.progress.samples >= by_samples
        return self.progress.step >= self.train_iters

    def _step(self) -> bool:
        """One optimizer step and its records; returns whether the ranks agreed to stop after it."""
        began = time.perf_counter()
        progress, run, loader = self.progress, self.run, self.loaders.train
        assert loader is not None, "nothing to train on"
        size = run.blueprint.batch_schedule.global_batch_size(progress.samples)
        micro = self.train.micro_batch_size
        waited = loader.seconds_waited
        batches = loader.next_batches(
            progress.samples, size, micro, size // (micro * run.ctx.dp.size)
        )
        result = train_step(
            run,
            batches,
            lr=self.learning_rate.at(progress.lr_samples),
            weight_decay=self.weight_decay.at(progress.lr_samples),
            wants_stop=self.stop.wanted_here(),
        )
        loss = result.loss.item()  # waits for the device
        agreed = result.wants_stop.item() > 0
        self._account(size, result)
        record = self.meter.add(
            Step(
                iteration=progress.step,
                samples=progress.samples,
                tokens=progress.tokens,
                global_batch_size=size,
                seq_length=self.seq_length,
                seconds=time.perf_counter() - began,
                data_seconds=loader.seconds_waited - waited,
                loss=loss,
                learning_rate=self.learning_rate.at(progress.lr_samples),
                weight_decay=self.weight_decay.at(progress.lr_samples),
                loss_scale=run.engine.loss_scale,
                grad_norm=result.update.grad_norm.item(),
                num_zeros=result.update.num_zeros,
                params_norm=result.update.params_norm,
                skipped=result.update.skipped,
                memory_bytes=peak_memory_bytes(run.ctx.device),
            )
        )
        self.log.write(record)
        if (
            not math.isfinite(loss)
            and self.train.check_for_nan_in_loss_and_grad
            and not result.update.skipped
        ):
            raise NumericsError(
                f"the loss of iteration {progress.step} is {loss}: look at the data of samples "
                f"{progress.samples - size} to {progress.samples - 1}, or lower --lr"
            )
        return agreed

    def _account(self, size: int, result: StepResult) -> None:
        progress = self.progress
        progress.step += 1
        progress.samples += size
        progress.tokens += size * self.seq_length
        if result.update.skipped:
            progress.skipped_steps += 1
        else:
            progress.lr_samples += size
        progress.optimizer_steps = self.run.engine.steps
        progress.loss_scale = self.run.engine.scaler.state()

    def _log_interval(self, *, last: bool) -> None:
        every = self.telemetry.log_interval
        if self.progress.step == self.first_step + 1 or last or self.progress.step % every == 0:
            self.log.print(self.meter.take())

    def evaluate(self, split: str, *, final: bool) -> None:
        """Mean loss over --eval-iters batches, on the console and in the records."""
        loader = self.loaders.valid if split == "validation" else self.loaders.test
        if loader is None or not self.train.eval_iters:
            return
        began = time.perf_counter()
        progress, run, micro = self.progress, self.run, self.train.micro_batch_size
        size = run.blueprint.batch_schedule.final_batch_size
        start = progress.validation_samples if split == "validation" else 0
        total, count = 0.0, 0.0
        for index in range(self.train.eval_iters):
            batches = loader.next_batches(
                start + index * size, size, micro, size // (micro * run.ctx.dp.size)
            )
            batch_total, batch_count = evaluation_step(run, batches)
            total, count = total + batch_total.item(), count + batch_count.item()  # waits
        if split == "validation":
            progress.validation_samples += self.train.eval_iters * size
        record = EvaluationRecord(
            iteration=progress.step,
            split="validation" if split == "validation" else "test",
            samples=progress.samples,
            loss=total / count if count else math.nan,
            seconds=time.perf_counter() - began,
            final=final,
            timestamp=time.time(),
        )
        self.log.write(record)
        self.log.print(record)

    def save(self) -> None:
        """Write a checkpoint, if the run keeps any."""
        if self.store is None:
            return
        began = time.perf_counter()
        run = self.run
        saved = self.store.save(
            self.progress.step,
            weights=weight_slices(run.parameters, run.ctx, owned=True),
            optimizer=run.engine.state(owned=True) if self.checkpoint.save_optim else (),
            progress=self.progress,
            config=self.plain_config,
            keep_last=self.checkpoint.keep_last,
        )
        self.saved_at = self.progress.step
        record = SaveRecord(
            iteration=self.progress.step,
            bytes=saved.bytes,
            seconds=time.perf_counter() - began,
            folder=str(self.store.root),
            timestamp=time.time(),
        )
        self.log.write(record)
        self.log.print(record)
