"""fit: step after step, with logging, evaluation, checkpoints and stopping in between."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterator

from megatron_lite.config.errors import NumericsError, StorageError
from megatron_lite.optim.groups import Rates
from megatron_lite.optim.relative_step import step_factor
from megatron_lite.telemetry.record import EvaluationRecord, RanksRecord
from megatron_lite.telemetry.summary import never_ran
from megatron_lite.telemetry.throughput import Step
from megatron_lite.telemetry.timers import format_times, timing_record
from megatron_lite.train.ahead import Fed, UnheardStep, hear, update_unheard
from megatron_lite.train.ending.stop import PREEMPTIONS, Reason
from megatron_lite.train.health.replicas import check_replicas
from megatron_lite.train.measuring.device import memory_line, peak_memory_bytes
from megatron_lite.train.measuring.reports import memory_report
from megatron_lite.train.objectives.base import finished
from megatron_lite.train.session import Session
from megatron_lite.train.step import StepResult, begin_step, evaluation_step, settle


def fit(session: Session) -> Reason:
    """Train until the end or until a stop is requested; returns why it ended."""
    if session.train.manual_gc:
        gc.disable()
        gc.collect()
    try:
        with _its_last_record(session):
            reason = _train(session)
    except NumericsError:  # every rank raises it, so all can finish the save in flight
        with contextlib.suppress(StorageError):
            session.checkpoints.wait()
        raise
    finally:
        session.profiler.close()
        if session.train.manual_gc:
            gc.enable()
    session.checkpoints.finish()
    return reason


def _train(session: Session) -> Reason:
    progress = session.progress
    reason: Reason | None = "finished" if _finished(session) else None
    while reason is None:
        session.profiler.before(progress.step + 1)
        session.recording.before(progress.step + 1)
        session.faults.at("step")
        reason = _step(session)
        if session.train.manual_gc and _is_due(session.train.manual_gc_interval, progress.step):
            gc.collect()
    return reason


def learnt_nothing(session: Session) -> str:
    """What to say where no step of this start changed a weight; "" otherwise."""
    steps = session.progress.step - session.first_step
    if not steps or session.progress.skipped_steps - session.first_skipped < steps:
        return ""
    return f"*** {never_ran(steps, session.first_scale, session.run.engine.loss_scale)} ***"


def _finished(session: Session) -> bool:
    return session.progress.step >= session.reach.length.iterations


def _step(session: Session) -> Reason | None:
    """Begin the next step, hear the one before where that is still unheard, then update.

    Returns why to stop, where the step that was heard says so.
    """
    run, progress = session.run, session.progress
    fed = _feed(session)
    vote = session.stop.vote(save_failed=session.checkpoints.failed)
    begun = begin_step(run, fed.batches, vote)
    unheard = session.unheard
    if unheard is not None:
        was_good, reason = _hear(session, unheard)
        if reason is not None:
            run.engine.discard(begun.attempt.norm)
            return reason
        if not was_good:  # what was begun after it has no weights to begin from, and is gone
            begun = begin_step(run, fed.batches, vote)
    schedules, samples = session.schedules, progress.lr_samples
    rates = Rates(
        schedules.learning_rate.at(samples),
        schedules.weight_decay.at(samples),
        schedules.decoupled_at(samples),
    )
    if not run.runs_ahead or _must_be_heard(session):
        result = settle(run, begun, rates)
        _advance_progress(session, fed, skipped=result.update.skipped)
        session.profiler.after(progress.step)
        return _account(session, fed, result)
    before = progress.as_it_is()
    step = update_unheard(run, begun, rates)
    _advance_progress(session, fed, skipped=False)
    session.unheard = UnheardStep(fed, before, step, session.own_time.mark())
    session.presence.reached(progress.step)
    session.profiler.after(progress.step)
    return None


def _feed(session: Session) -> Fed:
    """The batches of the next step; its time begins."""
    began = time.perf_counter()
    if session.unheard is None:
        session.own_time.begin()
    progress, run, loader = session.progress, session.run, session.loaders.train
    assert loader is not None, "nothing to train on"
    size = run.blueprint.batch_schedule.global_batch_size(progress.samples)
    waited = loader.seconds_waited
    with run.timers.span("batch-generator"):
        batches = loader.next_batches(
            progress.samples, session.train.micro_batch_size, run.blueprint.microbatches(size)
        )
    return Fed(batches, size, began, loader.seconds_waited - waited)


def _must_be_heard(session: Session) -> bool:
    """Whether something follows the current step that needs its outcome: all ranks find the same.

    The first step of a process is heard at once, too: it is slow, and its line is looked for.
    """
    step, due = session.progress.step + 1, (
        session.train.exit_interval, session.guards.check_replicas, session.train.eval_interval,
        session.checkpoint.save_interval, session.telemetry.log_memory_interval,
    )  # fmt: skip
    return (
        step in (session.first_step + 1, session.reach.length.iterations)
        or any(_is_due(every, step) for every in due)
        or any(second.is_due(step) for second in session.run.second_passes)
    )


def _hear(session: Session, step: UnheardStep) -> tuple[bool, Reason | None]:
    """Whether the update of the step was made, and why to stop after it."""
    run, progress = session.run, session.progress
    session.unheard = None
    result = hear(run, step.step)
    if result is not None:
        return True, _account(session, step.fed, result, step.waited)
    run.engine.take_back()
    progress.go_back(step.before)
    session.presence.reached(progress.step)
    result = settle(run, step.step.begun, step.step.rates)
    _advance_progress(session, step.fed, skipped=result.update.skipped)
    return False, _account(session, step.fed, result)


@contextlib.contextmanager
def _its_last_record(session: Session) -> Iterator[None]:
    """Where a step fails: record and line of a good one before it, if they are there.  Not collective."""
    try:
        yield
    except BaseException:
        step, session.unheard = session.unheard, None
        with contextlib.suppress(Exception):  # what failed first counts; a device may be broken
            if step is not None and step.step.begun.attempt.numbers.is_there:
                result = hear(session.run, step.step)
                if result is not None:
                    _record(session, step.fed, result)
                    if _line_is_due(session):
                        session.log.print(session.meter.take())
        raise


def _account(
    session: Session, fed: Fed, result: StepResult, waited: float | None = None
) -> Reason | None:
    """All that follows a step whose outcome is known; why to stop after it.  Collective.

    waited: mark of the waits that belong to it, where the next step has begun.
    """
    progress, train = session.progress, session.train
    seconds = _record(session, fed, result)
    session.own_time.end(seconds, waited)
    if result.stop is not None:
        session.log.print(session.meter.take())  # the loss of the step that ends the run, too
        raise NumericsError(result.stop)
    session.presence.reached(progress.step)
    agreed = result.heard.agreed
    if agreed.save_failed:
        session.checkpoints.wait()
        session.checkpoints.confirm()
    session.checkpoints.report_completed()
    reason = session.stop.reason(progress.step, agreed=agreed, finished=_finished(session))
    session.log.say(*session.recording.after(progress.step, last=reason is not None))
    _log_interval(session, last=reason is not None)
    if _is_due(session.guards.check_replicas, progress.step) or reason is not None:
        _check_replicas(session)
    if reason not in PREEMPTIONS and _is_due(train.eval_interval, progress.step):
        evaluate(session, "validation", final=False)
    if _is_due(session.checkpoint.save_interval, progress.step):
        _save(session)
    if _is_due(session.telemetry.log_memory_interval, progress.step):
        count = session.telemetry.straggler_minmax_count
        _report(session, memory_report(session.run.ctx, progress, count))
    return reason


def _record(session: Session, fed: Fed, result: StepResult) -> float:
    """Write the record of a step and its warnings; returns the seconds it took.

    Of steps that follow one another without a wait, those since the one before was heard.
    """
    progress, run, heard = session.progress, session.run, result.heard
    now = time.perf_counter()
    seconds, session.heard_at = now - max(fed.began, session.heard_at), now
    record = session.meter.add(
        Step(
            iteration=progress.step,
            samples=progress.samples,
            tokens=progress.tokens,
            global_batch_size=fed.size,
            seq_length=session.seq_length,
            seconds=seconds,
            data_seconds=fed.data_seconds,
            loss=heard.seen.loss,
            metrics=result.metrics,
            learning_rate=session.schedules.learning_rate.at(progress.lr_samples)
            * step_factor(run.blueprint.optim, run.engine.progress().steps),
            decoupled_learning_rate=session.schedules.decoupled_at(progress.lr_samples),
            weight_decay=session.schedules.weight_decay.at(progress.lr_samples),
            loss_scale=run.engine.loss_scale,
            grad_norm=heard.grad_norm,
            skipped=result.update.skipped,
            memory_bytes=peak_memory_bytes(run.ctx.device),
            **result.statistics,
        )
    )
    session.log.write(record)
    skipped = f" - skipped, {progress.skipped_steps} so far" if result.update.skipped else ""
    session.log.warn(*(warning + skipped for warning in result.warnings))
    return seconds


def _advance_progress(session: Session, fed: Fed, *, skipped: bool) -> None:
    progress = session.progress
    progress.count(fed.size, session.seq_length, skipped=skipped)
    done = session.run.engine.progress()
    progress.optimizer_steps, progress.loss_scale = done.steps, done.loss_scale


def _line_is_due(session: Session) -> bool:
    step = session.progress.step
    return step == session.first_step + 1 or step % session.telemetry.log_interval == 0


def _log_interval(session: Session, *, last: bool) -> None:
    step = session.progress.step
    if not last and not _line_is_due(session):
        return
    record = session.meter.take()
    session.log.print(record)
    if session.telemetry.watches(session.run.ctx.world_size):
        own = session.own_time.report(session.progress, session.telemetry)
        if session.telemetry.log_straggler or session.own_time.stays_slow(own):
            _report(session, own)
    if not session.reported_memory:
        ctx = session.run.ctx
        line = memory_line(ctx.device, rank=ctx.rank, iterations=step)
        if line is not None:
            session.log.say_of_shard(line)
        session.reported_memory = True
    _log_times(session, step - session.logged_at)
    session.logged_at = step


def _save(session: Session) -> None:
    _check_replicas(session)
    session.checkpoints.save()


def _check_replicas(session: Session) -> None:
    """Once per step at most; before a save, too: what has drifted must not replace what is good."""
    if session.guards.check_replicas and session.replicas_checked_at < session.progress.step:
        check_replicas(session.run)
        session.replicas_checked_at = session.progress.step


def _report(session: Session, record: RanksRecord | None) -> None:
    if record is not None:
        session.log.write(record)
        session.log.print(record)


def _log_times(session: Session, iterations: int) -> None:
    """The spans of --timing-log-level, per iteration.  Collective from level 1 on."""
    if session.telemetry.timing_log_level == 0:
        return
    times = session.run.timers.gather(session.run.ctx)
    progress = session.progress
    record = timing_record(
        times, iteration=progress.step, samples=progress.samples, iterations=iterations
    )
    option = session.telemetry.timing_log_option
    text = format_times(times, option=option, iterations=iterations)
    session.log.print(record if session.log.form == "json" else text)
    session.log.write(record)


def evaluate(session: Session, split: str, *, final: bool) -> None:
    """Mean loss over --eval-iters batches, on the console and in the records."""
    loader = session.loaders.valid if split == "validation" else session.loaders.test
    if loader is None or not session.train.eval_iters:
        return
    began = time.perf_counter()
    progress, run, micro = session.progress, session.run, session.train.micro_batch_size
    size, count = run.blueprint.batch_schedule.final_batch_size, run.blueprint.microbatches()
    # as Megatron: validation resumes where the last one stopped, unless nothing is trained
    goes_on = split == "validation" and not session.train.skip_train
    start = progress.validation_samples if goes_on else 0
    sums = [0.0, 0.0, *(0.0 for _ in run.objective.metrics)]
    for index in range(session.train.eval_iters):
        session.presence.tick()
        session.faults.at("evaluate")
        batches = loader.next_batches(start + index * size, micro, count)
        with run.timers.paused():
            found = evaluation_step(run, batches).tolist()  # waits for the device
        sums = [have + new for have, new in zip(sums, found, strict=True)]
    total, weight = sums[:2]
    if goes_on:
        progress.validation_samples += session.train.eval_iters * size
    record = EvaluationRecord(
        iteration=progress.step,
        split="validation" if split == "validation" else "test",
        samples=progress.samples,
        loss=total / weight if weight else math.nan,
        loss_name=session.meter.loss_name,
        metrics=finished(run.objective, sums[2:], weight),
        seconds=time.perf_counter() - began,
        final=final,
        alone=session.train.skip_train,
        timestamp=time.time(),
    )
    session.log.write(record)
    session.log.print(record)


def _is_due(every: int | None, step: int) -> bool:
    """Whether something done at multiples of `every` is done after this step; never for 0 or None."""
    return every is not None and every > 0 and step % every == 0
