"""Batch sizes against Megatron's published ramp and a plain loop over steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.blueprint.batches import BatchSchedule, batch_schedule, padded_vocab_size
from megatron_lite.config.sections.train import TrainConfig


def ramp(*rampup: int, final: int, micro: int = 1, dp: int = 1) -> BatchSchedule:
    train = TrainConfig(
        micro_batch_size=micro, global_batch_size=final, rampup_batch_size=list(rampup)
    )
    return batch_schedule(train, seq_length=2048, dp=dp)


GPT3_RAMP = ramp(16, 16, 5859375, final=1536)


@pytest.mark.parametrize(("tp", "padded"), [(1, 50304), (2, 50432), (4, 50688), (8, 51200)])
def test_gpt2_vocabulary_is_padded_as_by_megatron(tp: int, padded: int) -> None:
    assert padded_vocab_size(50257, 128, tp) == padded


def test_a_vocabulary_that_fits_is_not_padded() -> None:
    assert padded_vocab_size(51200, 128, 8) == 51200


@pytest.mark.parametrize(
    ("size", "iteration", "samples"),
    [(32, 3855, 61680), (320, 13678, None), (768, 17110, None), (1536, 19802, 5859424)],
)
def test_gpt3_ramp_changes_at_megatrons_iterations(
    size: int, iteration: int, samples: int | None
) -> None:
    (phase,) = [p for p in GPT3_RAMP.phases() if p.global_batch_size == size]
    assert phase.iteration == iteration
    assert samples is None or phase.samples == samples
    assert GPT3_RAMP.samples_after(iteration) == phase.samples
    assert GPT3_RAMP.global_batch_size(phase.samples) == size
    assert GPT3_RAMP.global_batch_size(GPT3_RAMP.samples_after(iteration - 1)) == size - 16


def test_gpt3_ramp_equals_megatrons_formula_at_every_thousandth_sample() -> None:
    per_increment = 5859375 / 95
    for consumed in range(0, 6_000_000, 997):
        expected = 1536 if consumed > 5859375 else 16 + int(consumed / per_increment) * 16
        assert GPT3_RAMP.global_batch_size(consumed) == expected


@pytest.mark.parametrize(
    ("consumed", "size"), [(49, 102), (50, 102), (51, 108), (100, 168), (101, 174)]
)
def test_a_threshold_that_is_a_whole_number_is_met_as_megatrons_doubles_meet_it(
    consumed: int, size: int
) -> None:
    # recorded from megatron-core 0.16.1: 50 samples are 11 of 22 shares, but 50 / (100 / 22) < 11
    schedule = ramp(42, 6, 100, final=174, micro=2, dp=3)
    assert schedule.global_batch_size(consumed) == size


def test_a_schedule_taken_up_counts_on_from_what_was_done_before() -> None:
    before = ramp(2, 2, 24, final=8)
    later = batch_schedule(TrainConfig(global_batch_size=3), seq_length=8, dp=1)
    past = [phase for phase in before.phases() if phase.iteration < 7]
    schedule = later.taken_up(past, 7, before.samples_after(7))
    for iteration in range(7):
        assert schedule.samples_after(iteration) == before.samples_after(iteration)
    assert schedule.samples_after(9) == before.samples_after(7) + 6
    assert schedule.iterations_within(schedule.samples_after(9) + 2) == 9
    assert schedule.anew() == later
    assert before.taken_up(past, 7, before.samples_after(7)).phases() == before.phases()


@given(steps=st.integers(1, 50), samples=st.integers(50, 900))
def test_a_past_that_nobody_recorded_is_cut_into_even_steps(steps: int, samples: int) -> None:
    schedule = batch_schedule(TrainConfig(global_batch_size=4), seq_length=8, dp=1)
    taken_up = schedule.taken_up([], steps, samples)
    sizes = [taken_up.samples_after(i + 1) - taken_up.samples_after(i) for i in range(steps)]
    assert sum(sizes) == samples and max(sizes) - min(sizes) <= 1
    assert taken_up.samples_after(steps + 2) == samples + 8


def test_todays_gpt3_step_schedule_switches_at_its_tokens() -> None:
    text = "0:16 2.4B:320 4.8B:624 7.2B:928 9.6B:1232 12B:1536"
    train = TrainConfig(micro_batch_size=1, global_batch_size=1536, step_batch_size_schedule=text)
    schedule = batch_schedule(train, seq_length=2048, dp=16)
    assert schedule.thresholds == (0, 1171875, 2343750, 3515625, 4687500, 5859375)
    assert schedule.sizes == (16, 320, 624, 928, 1232, 1536)
    assert schedule.global_batch_size(1171874) == 16
    assert schedule.global_batch_size(1171875) == 320
    assert schedule.microbatches(320) == 20
    # 1,171,875 / 16 is 73,242.1875: the step that starts below the threshold keeps its size
    assert schedule.phases()[1] == (73243, 1171888, 320)


def test_constant_batch_divides_into_micro_batches() -> None:
    train = TrainConfig(micro_batch_size=2, global_batch_size=24)
    schedule = batch_schedule(train, seq_length=8, dp=3)
    assert schedule.microbatches(24) == 4 and schedule.microbatches(6) == 1
    assert schedule.samples_after(10) == 240
    assert schedule.iterations_within(263) == 10


def test_global_batch_defaults_to_one_micro_batch_per_replica() -> None:
    schedule = batch_schedule(TrainConfig(micro_batch_size=3), seq_length=8, dp=4)
    assert schedule.sizes == (12,)


def test_a_ramp_over_no_samples_starts_at_full_size() -> None:
    assert ramp(4, 4, 0, final=16).sizes == (16,)


def test_a_ramp_shorter_than_its_steps_jumps_over_sizes() -> None:
    schedule = ramp(4, 4, 2, final=16)
    assert [schedule.global_batch_size(c) for c in (0, 1, 2)] == [4, 8, 16]
    assert [tuple(p) for p in schedule.phases()] == [(0, 0, 4), (1, 4, 16)]


@given(
    start=st.integers(1, 6),
    increment=st.integers(1, 5),
    increments=st.integers(0, 6),
    samples=st.integers(0, 300),
    limit=st.integers(0, 400),
)
def test_closed_forms_equal_a_loop_over_steps(
    start: int, increment: int, increments: int, samples: int, limit: int
) -> None:
    final = start + increment * increments
    schedule = ramp(start, increment, samples, final=final)
    consumed, iterations = 0, 0
    while True:
        assert schedule.samples_after(iterations) == consumed
        # Megatron's division of doubles, which may meet a whole threshold a sample late
        size = final
        if consumed <= samples and samples and increments:
            size = start + int(consumed / (samples / increments)) * increment
        assert schedule.global_batch_size(consumed) == size
        if consumed + size > limit:
            break
        consumed, iterations = consumed + size, iterations + 1
    assert schedule.iterations_within(limit) == iterations
