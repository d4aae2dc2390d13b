"""fit: step after step, with logging, evaluation, checkpoints and stopping in between."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lite.checkpoint.progress import Progress
from megatron_lite.config.errors import NumericsError, StorageError
from megatron_lite.config.sections.checkpoint import CheckpointConfig
from megatron_lite.config.sections.guards import GuardsConfig
from megatron_lite.config.sections.telemetry import TelemetryConfig
from megatron_lite.config.sections.train import TrainConfig
from megatron_lite.rendezvous.heartbeat import Presence
from megatron_lite.telemetry.record import EvaluationRecord, RanksRecord
from megatron_lite.telemetry.summary import never_ran
from megatron_lite.telemetry.throughput import IntervalMeter, Step
from megatron_lite.telemetry.timers import format_times, timing_record
from megatron_lite.train.checkpoints import Checkpoints
from megatron_lite.train.ending.faults import Fault, NoFaults
from megatron_lite.train.ending.stop import PREEMPTIONS, Reason, StopRequests, StopVote
from megatron_lite.train.health.replicas import check_replicas
from megatron_lite.train.measuring.device import memory_line, peak_memory_bytes
from megatron_lite.train.measuring.log import Log
from megatron_lite.train.measuring.profile import Profiler
from megatron_lite.train.measuring.reports import OwnTime, memory_report
from megatron_lite.train.measuring.timeline import StepRecording
from megatron_lite.train.reading import Loaders, Reach
from megatron_lite.train.run import Run
from megatron_lite.train.schedules import Schedules
from megatron_lite.train.step import StepResult, evaluation_step, train_step


@dataclass(slots=True)
class Session:
    """A Run and everything around its steps.  Every rank carries out the same session."""

    run: Run
    train: TrainConfig
    guards: GuardsConfig
    telemetry: TelemetryConfig
    checkpoint: CheckpointConfig
    loaders: Loaders
    schedules: Schedules
    log: Log
    meter: IntervalMeter
    stop: StopRequests
    profiler: Profiler
    recording: StepRecording
    folder: Path
    checkpoints: Checkpoints
    reach: Reach
    own_time: OwnTime
    seq_length: int
    presence: Presence
    faults: Fault | NoFaults
    logged_at: int = field(init=False)
    progress: Progress = field(init=False)
    first_step: int = field(init=False)
    first_skipped: int = field(init=False)
    first_scale: float = field(init=False)
    reported_memory: bool = field(init=False, default=False)
    replicas_checked_at: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.progress = self.run.progress
        self.first_step = self.logged_at = self.progress.step
        self.first_skipped = self.progress.skipped_steps
        self.first_scale = self.run.engine.loss_scale

    def fit(self) -> Reason:
        """Train until the end or until somebody asks for a stop; returns why it ended."""
        if self.train.manual_gc:
            gc.disable()
            gc.collect()
        try:
            reason = self._train()
        except NumericsError:  # every rank raises it, so all can finish the save under way
            with contextlib.suppress(StorageError):
                self.checkpoints.settle()
            raise
        finally:
            self.profiler.close()
            if self.train.manual_gc:
                gc.enable()
        self.checkpoints.finish()
        return reason

    def _train(self) -> Reason:
        progress = self.progress
        reason: Reason | None = "finished" if self._finished() else None
        while reason is None:
            self.profiler.before(progress.step + 1)
            self.recording.before(progress.step + 1)
            self.faults.at("step")
            agreed = self._step()
            self.profiler.after(progress.step)
            if agreed.save_failed:
                self.checkpoints.settle()
                self.checkpoints.confirm()
            self.checkpoints.tell()
            reason = self.stop.reason(progress.step, agreed=agreed, finished=self._finished())
            self.log.say(*self.recording.after(progress.step, last=reason is not None))
            self._log_interval(last=reason is not None)
            if _is_due(self.guards.check_replicas, progress.step) or reason is not None:
                self._check_replicas()
            if reason not in PREEMPTIONS and _is_due(self.train.eval_interval, progress.step):
                self.evaluate("validation", final=False)
            if _is_due(self.checkpoint.save_interval, progress.step):
                self._save()
            if _is_due(self.telemetry.log_memory_interval, progress.step):
                count = self.telemetry.straggler_minmax_count
                self._report(memory_report(self.run.ctx, progress, count))
            if self.train.manual_gc and _is_due(self.train.manual_gc_interval, progress.step):
                gc.collect()
        return reason

    def learnt_nothing(self) -> str:
        """What to say where no step of this start changed a weight; "" otherwise."""
        steps = self.progress.step - self.first_step
        if not steps or self.progress.skipped_steps - self.first_skipped < steps:
            return ""
        return f"*** {never_ran(steps, self.first_scale, self.run.engine.loss_scale)} ***"

    def _finished(self) -> bool:
        return self.progress.step >= self.reach.length.iterations

    def _step(self) -> StopVote:
        """One optimizer step and its records; returns what the ranks agreed to stop for after it."""
        began = time.perf_counter()
        self.own_time.begin()
        progress, run, loader = self.progress, self.run, self.loaders.train
        assert loader is not None, "nothing to train on"
        size = run.blueprint.batch_schedule.global_batch_size(progress.samples)
        waited = loader.seconds_waited
        with run.timers.span("batch-generator"):
            batches = loader.next_batches(
                progress.samples, self.train.micro_batch_size, run.blueprint.microbatches(size)
            )
        result = train_step(
            run,
            batches,
            lr=self.schedules.learning_rate.at(progress.lr_samples),
            weight_decay=self.schedules.weight_decay.at(progress.lr_samples),
            decoupled_lr=self.schedules.decoupled_at(progress.lr_samples),
            vote=self.stop.vote(save_failed=self.checkpoints.failed),
        )
        loss = result.loss.item()  # waits for the device
        self.own_time.end(time.perf_counter() - began)
        agreed = StopVote(*(votes > 0 for votes in result.votes.tolist()))
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
                learning_rate=self.schedules.learning_rate.at(progress.lr_samples),
                decoupled_learning_rate=self.schedules.decoupled_at(progress.lr_samples),
                weight_decay=self.schedules.weight_decay.at(progress.lr_samples),
                loss_scale=run.engine.loss_scale,
                grad_norm=result.update.grad_norm.item(),
                num_zeros=result.update.num_zeros,
                params_norm=result.update.params_norm,
                skipped=result.update.skipped,
                memory_bytes=peak_memory_bytes(run.ctx.device),
            )
        )
        self.log.write(record)
        skipped = f" - skipped, {progress.skipped_steps} so far" if result.update.skipped else ""
        self.log.warn(*(warning + skipped for warning in result.warnings))
        if result.stop is not None:
            self.log.print(self.meter.take())  # the loss of the step that ends the run, too
            raise NumericsError(result.stop)
        self.presence.reached(progress.step)
        return agreed

    def _account(self, size: int, result: StepResult) -> None:
        progress = self.progress
        progress.count(size, self.seq_length, skipped=result.update.skipped)
        done = self.run.engine.progress()
        progress.optimizer_steps, progress.loss_scale = done.steps, done.loss_scale

    def _log_interval(self, *, last: bool) -> None:
        step, every = self.progress.step, self.telemetry.log_interval
        if step != self.first_step + 1 and not last and step % every:
            return
        record = self.meter.take()
        self.log.print(record)
        if self.telemetry.watches(self.run.ctx.world_size):
            own = self.own_time.report(self.progress, self.telemetry)
            if self.telemetry.log_straggler or self.own_time.stays_slow(own):
                self._report(own)
        if not self.reported_memory:
            ctx = self.run.ctx
            line = memory_line(ctx.device, rank=ctx.rank, iterations=step)
            if line is not None:
                self.log.say_of_shard(line)
            self.reported_memory = True
        self._log_times(step - self.logged_at)
        self.logged_at = step

    def _save(self) -> None:
        self._check_replicas()
        self.checkpoints.save()

    def _check_replicas(self) -> None:
        """Once per step at most; before a save, too: what has drifted must not replace what is good."""
        if self.guards.check_replicas and self.replicas_checked_at < self.progress.step:
            check_replicas(self.run)
            self.replicas_checked_at = self.progress.step

    def _report(self, record: RanksRecord | None) -> None:
        if record is not None:
            self.log.write(record)
            self.log.print(record)

    def _log_times(self, iterations: int) -> None:
        """The spans of --timing-log-level, per iteration.  Collective from level 1 on."""
        if self.telemetry.timing_log_level == 0:
            return
        times = self.run.timers.gather(self.run.ctx)
        progress = self.progress
        record = timing_record(
            times, iteration=progress.step, samples=progress.samples, iterations=iterations
        )
        option = self.telemetry.timing_log_option
        text = format_times(times, option=option, iterations=iterations)
        self.log.print(record if self.log.form == "json" else text)
        self.log.write(record)

    def evaluate(self, split: str, *, final: bool) -> None:
        """Mean loss over --eval-iters batches, on the console and in the records."""
        loader = self.loaders.valid if split == "validation" else self.loaders.test
        if loader is None or not self.train.eval_iters:
            return
        began = time.perf_counter()
        progress, run, micro = self.progress, self.run, self.train.micro_batch_size
        size, count = run.blueprint.batch_schedule.final_batch_size, run.blueprint.microbatches()
        # as Megatron: validation goes on where the last one stopped, unless nothing is trained
        goes_on = split == "validation" and not self.train.skip_train
        start = progress.validation_samples if goes_on else 0
        total, tokens = 0.0, 0.0
        for index in range(self.train.eval_iters):
            self.presence.tick()
            self.faults.at("evaluate")
            batches = loader.next_batches(start + index * size, micro, count)
            with run.timers.paused():
                batch_total, batch_count = evaluation_step(run, batches)
            total, tokens = total + batch_total.item(), tokens + batch_count.item()  # waits
        if goes_on:
            progress.validation_samples += self.train.eval_iters * size
        record = EvaluationRecord(
            iteration=progress.step,
            split="validation" if split == "validation" else "test",
            samples=progress.samples,
            loss=total / tokens if tokens else math.nan,
            seconds=time.perf_counter() - began,
            final=final,
            alone=self.train.skip_train,
            timestamp=time.time(),
        )
        self.log.write(record)
        self.log.print(record)


def _is_due(every: int | None, step: int) -> bool:
    """Whether something done at multiples of `every` is done after this step; never for 0 or None."""
    return every is not None and every > 0 and step % every == 0
