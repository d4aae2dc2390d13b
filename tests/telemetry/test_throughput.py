"""Rates by hand: what is counted, what is left out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_lite.telemetry.throughput import IntervalMeter, Step

FLOPS = 1.0764e12  # GPT-3 175B per token, full attention
CAUSAL = 1.0619e12


def meter(**settings: object) -> IntervalMeter:
    return IntervalMeter(
        **{
            "train_iters": 100,
            "train_samples": 1600,
            "world_size": 4,
            "flops_per_token": FLOPS,
            "causal_flops_per_token": CAUSAL,
            "clock": lambda: 123.0,
            **settings,
        }
    )


def step(iteration: int, **changes: object) -> Step:
    base = Step(
        iteration=iteration,
        samples=iteration * 16,
        tokens=iteration * 16 * 128,
        global_batch_size=16,
        seq_length=128,
        seconds=2.0,
        data_seconds=0.5,
        loss=3.0,
        learning_rate=1e-4,
        weight_decay=0.1,
    )
    return replace(base, **changes)


def test_rates_of_a_steady_interval():
    interval = meter(peak_tflops=1000.0)
    interval.add(step(1, seconds=50.0))
    interval.take()
    interval.add(step(2, seconds=1.0, data_seconds=0.1))
    interval.add(step(3, seconds=3.0, data_seconds=0.3))
    record = interval.take()
    assert record.seconds_per_iteration == 2.0
    assert record.samples_per_second == 8.0
    assert record.tokens_per_second_per_gpu == 256.0
    assert record.tflops_per_gpu == pytest.approx(256.0 * 1.0764)
    assert record.tflops_causal == pytest.approx(256.0 * 1.0619)
    assert record.mfu == pytest.approx(0.2755584)
    assert record.data_seconds == pytest.approx(0.2)
    assert record.eta_seconds == 97 * 2.0
    assert (record.iteration, record.samples, record.tokens) == (3, 48, 6144)
    assert (record.warmup, record.timestamp) == (False, 123.0)


def test_published_tgs_gives_the_published_tflops():
    interval = meter(world_size=64, train_iters=10)
    seconds = 1536 * 2048 / 64 / 138.0
    record = interval.add(step(5, global_batch_size=1536, seq_length=2048, seconds=seconds))
    assert record.tokens_per_second_per_gpu == pytest.approx(138.0)
    assert round(record.tflops_per_gpu, 1) == 148.5
    assert round(record.tflops_causal, 1) == 146.5


def test_the_first_step_is_left_out_of_the_times_but_not_of_the_loss():
    interval = meter()
    interval.add(step(11, seconds=60.0, data_seconds=9.0, loss=5.0))
    interval.add(step(12, loss=3.0))
    record = interval.take()
    assert (record.seconds_per_iteration, record.data_seconds, record.warmup) == (2.0, 0.5, False)
    assert record.tokens_per_second_per_gpu == 256.0
    assert record.loss == 4.0


def test_an_interval_of_only_the_first_step_says_warmup():
    interval = meter()
    own = interval.add(step(1, seconds=8.0))
    record = interval.take()
    assert own == record
    assert (record.warmup, record.seconds_per_iteration) == (True, 8.0)
    interval.add(step(2))
    assert interval.take().warmup is False


def test_a_batch_ramp_counts_the_samples_of_every_step():
    interval = meter()
    interval.add(step(1))
    interval.take()
    interval.add(step(2, global_batch_size=16, seconds=1.0))
    interval.add(step(3, global_batch_size=32, seconds=1.0))
    record = interval.take()
    assert record.global_batch_size == 32
    assert record.samples_per_second == 24.0
    assert record.tokens_per_second_per_gpu == 24 * 128 / 4


def test_loss_is_the_mean_over_steps_that_advanced():
    interval = meter()
    interval.add(step(1, loss=99.0, skipped=True))
    interval.add(step(2, loss=4.0))
    interval.add(step(3, loss=2.0))
    record = interval.take()
    assert (record.loss, record.skipped_iterations, record.nan_iterations) == (3.0, 1, 0)


def test_a_metric_is_the_mean_over_the_steps_that_advanced_and_have_it():
    interval = meter()
    interval.add(step(1, metrics={"accuracy": 1.0}, skipped=True))
    interval.add(step(2, metrics={"accuracy": 0.25, "hessian/loss": 3.0}))
    interval.add(step(3, metrics={"accuracy": 0.75}))
    assert interval.take().metrics == {"accuracy": 0.5, "hessian/loss": 3.0}


def test_an_interval_of_skipped_steps_shows_their_loss():
    interval = meter()
    interval.add(step(1, loss=11.0, skipped=True))
    interval.add(step(2, loss=10.0, skipped=True))
    record = interval.take()
    assert (record.loss, record.skipped_iterations) == (10.5, 2)


def test_nan_of_a_step_that_advanced_stays_visible_and_is_counted():
    interval = meter()
    interval.add(step(1, loss=math.nan))
    interval.add(step(2))
    record = interval.take()
    assert math.isnan(record.loss) and record.nan_iterations == 1


def test_nan_of_a_skipped_step_does_not_hide_the_others():
    interval = meter()
    interval.add(step(1, loss=math.nan, skipped=True))
    interval.add(step(2))
    record = interval.take()
    assert (record.loss, record.nan_iterations, record.skipped_iterations) == (3.0, 1, 1)


def test_take_begins_a_new_interval():
    interval = meter()
    assert interval.is_empty
    interval.add(step(1, loss=5.0))
    assert not interval.is_empty
    interval.take()
    assert interval.is_empty
    interval.add(step(2, loss=1.0))
    assert interval.take().loss == 1.0
