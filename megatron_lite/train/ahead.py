"""Steps that do not wait for the device: the update of step k is enqueued before its numbers are read.

    begin k ─ update k, if good ─ begin k + 1 ─ hear k ─ update k + 1, if good ─ begin k + 2 ─ hear k + 1

Whether the update is made is decided on the device, from the same sums the guards judge.  The host
hears of step k just before it enqueues the update of step k + 1, so learning rate and counters are
right, and no update follows a bad step: what was begun after it is discarded, its own update is taken
back, and settle() does with it what a run that waits does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lite.checkpoint.progress import Progress
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.data.batch import Batch
from megatron_lite.engines.base import Engine, Update
from megatron_lite.optim.groups import Rates
from megatron_lite.train.health.guards import Act
from megatron_lite.train.measured import Measured, measure_update
from megatron_lite.train.run import Run
from megatron_lite.train.step import Begun, StepResult, result_of, with_measured

BESIDE_THE_HOST = ("cuda",)
"""Kinds of devices that compute beside the host."""


@dataclass(frozen=True, slots=True)
class Unheard:
    """A step whose update is enqueued, made where the device finds it good; nobody has read its numbers."""

    begun: Begun
    rates: Rates
    update: Update
    measured: Measured | None


@dataclass(frozen=True, slots=True)
class Fed:
    """What a step reads: its batches, their samples over all ranks, when it began, the wait for data."""

    batches: Sequence[Batch]
    size: int
    began: float
    data_seconds: float


@dataclass(frozen=True, slots=True)
class UnheardStep:
    """A step that the run already counts and nobody has heard of yet.

    before: the progress without it; waited: mark behind its waits for other ranks.
    """

    fed: Fed
    before: Progress
    step: Unheard
    waited: float


def update_unheard(run: Run, begun: Begun, rates: Rates) -> Unheard:
    """Enqueue the update of a step; the engine counts it as made until it is taken back."""
    attempt = begun.attempt
    update = run.engine.apply(attempt.norm, **rates._asdict(), taken=attempt.taken)
    measured = measure_update(update, begun.due, run.engine)
    return Unheard(begun, rates, update, measured)


def hear(run: Run, unheard: Unheard) -> StepResult | None:
    """What a step has come to; None where its update was not made: take it back and settle the step."""
    begun, update = unheard.begun, unheard.update
    heard = begun.attempt.hear()
    if not heard.taken:
        return None
    verdict = run.guards.judge(heard.seen, run.progress)
    assert verdict.act < Act.SKIP and not verdict.replay, f"the device has taken it: {verdict}"
    run.guards.note(heard.seen, run.progress)
    result = result_of(begun, begun.attempt, heard, update, verdict.what)
    return result if unheard.measured is None else with_measured(result, unheard.measured)


def waits_because(config: RunConfig, engine: Engine) -> tuple[str, ...]:
    """Why the host must hear of each step before its update, by the flags that ask for it; () else."""
    guards, telemetry = config.guards, config.telemetry
    spikes = guards.loss_spike_factor > 0.0 or guards.grad_norm_spike_factor > 0.0
    reasons = {
        "--fp16 (each step may move its loss scale)": config.precision.fp16,
        f"--on-spike {guards.on_spike}": spikes and guards.on_spike != "warn",
        "--rerun-mode validate_results": spikes and guards.rerun_mode == "validate_results",
        f"--timing-log-level {telemetry.timing_log_level}": telemetry.timing_log_level > 0,
        "--profile-timeline": telemetry.profile_timeline,
        engine.waits_because: bool(engine.waits_because),
    }
    return tuple(reason for reason, holds in reasons.items() if holds)
