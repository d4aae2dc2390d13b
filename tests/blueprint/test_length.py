"""The end of a run and what it reads: Megatron's numbers, and never less than is read."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.blueprint.batches import BatchSchedule, batch_schedule
from megatron_lite.blueprint.length import run_length, sample_counts
from megatron_lite.config.sections.train import TrainConfig


def schedule_of(train: TrainConfig) -> BatchSchedule:
    return batch_schedule(train, seq_length=8, dp=1)


@pytest.mark.parametrize(
    ("flags", "length"),
    [
        ({"train_iters": 7, "global_batch_size": 4}, (7, 28)),
        ({"train_samples": 10, "global_batch_size": 4}, (2, 8)),
        ({"train_samples": 12, "global_batch_size": 4}, (3, 12)),
        ({"train_samples": 21, "global_batch_size": 8, "rampup_batch_size": [2, 2, 24]}, (6, 16)),
        ({"train_samples": 18, "step_batch_size_schedule": "0:4 64:8"}, (4, 24)),
        ({"train_samples": 16, "step_batch_size_schedule": "0:4 64:8"}, (3, 16)),
        ({"train_samples": 1, "step_batch_size_schedule": "0:4"}, (1, 4)),
        ({"train_epochs": 3, "epoch_samples": 5, "global_batch_size": 4}, (4, 16)),
        ({"train_epochs": 2, "epoch_samples": 6, "global_batch_size": 4}, (3, 12)),
        ({"train_epochs": 1, "epoch_samples": 1, "global_batch_size": 4}, (1, 4)),
        ({"train_epochs": 2, "global_batch_size": 4}, None),
    ],
)
def test_a_run_is_whole_steps(flags: dict[str, object], length: tuple[int, int] | None) -> None:
    train = TrainConfig(**flags)
    assert run_length(train, schedule_of(train)) == length


def test_a_fresh_run_asks_for_megatrons_numbers() -> None:
    flags = TrainConfig(global_batch_size=8, eval_iters=3, eval_interval=4, train_iters=10)
    assert sample_counts(flags, schedule_of(flags)) == {
        "train_samples": 80, "valid_samples": (10 // 4 + 1) * 24, "test_samples": 24,
    }  # fmt: skip
    ramp = dataclasses.replace(flags, rampup_batch_size=[2, 2, 24])
    assert sample_counts(ramp, schedule_of(ramp))["train_samples"] == 80
    by_samples = dataclasses.replace(flags, train_iters=None, train_samples=81)
    assert sample_counts(by_samples, schedule_of(by_samples))["train_samples"] == 81
    alone = dataclasses.replace(flags, skip_train=True)
    assert sample_counts(alone, schedule_of(alone), validation_samples=99) == {
        "train_samples": 0, "valid_samples": 24, "test_samples": 24,
    }  # fmt: skip


batch_flags = st.one_of(
    st.integers(1, 9).map(lambda size: {"global_batch_size": size}),
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.integers(0, 60)).map(
        lambda r: {"global_batch_size": r[0] + r[1] * r[2], "rampup_batch_size": [*r[:2], r[3]]}
    ),
    st.tuples(*[st.integers(1, 9)] * 3).map(
        lambda s: {"step_batch_size_schedule": f"0:{s[0]} 80:{s[1]} 200:{s[2]}"}
    ),
)


@given(
    before=batch_flags,
    after=batch_flags,
    done=st.integers(0, 20),
    more=st.integers(0, 20),
    evaluation=st.tuples(*[st.integers(0, 5)] * 4),
)
def test_data_hold_all_that_is_read_whatever_changes_at_a_resume(
    before: dict[str, object],
    after: dict[str, object],
    done: int,
    more: int,
    evaluation: tuple[int, int, int, int],
) -> None:
    first = TrainConfig(**before, train_iters=done + more + 1)
    old = schedule_of(first)
    past = [phase for phase in old.phases() if phase.iteration < done]
    evaluated = evaluation[0] * evaluation[1]
    train = TrainConfig(**after, train_iters=done + more, eval_interval=evaluation[2],
                        eval_iters=evaluation[3])  # fmt: skip
    schedule = schedule_of(train).taken_up(past, done, old.samples_after(done))
    counts = sample_counts(train, schedule, validation_samples=evaluated)
    consumed = old.samples_after(done)
    for step in range(done + 1, done + more + 1):
        consumed += schedule.global_batch_size(consumed)
        if evaluation[2] and step % evaluation[2] == 0:
            evaluated += evaluation[3] * schedule.final_batch_size
    evaluated += evaluation[3] * schedule.final_batch_size
    assert counts["train_samples"] >= consumed == schedule.samples_after(done + more)
    assert not evaluation[3] or counts["valid_samples"] >= evaluated


@given(flags=batch_flags, length=st.integers(1, 40), share=st.floats(0.0, 1.0))
def test_what_is_asked_for_does_not_move_during_a_run(
    flags: dict[str, object], length: int, share: float
) -> None:
    """The order of the samples follows from it."""
    train = TrainConfig(**flags, train_iters=length, eval_interval=3, eval_iters=2)
    schedule = schedule_of(train)
    done = int(length * share)
    past = [phase for phase in schedule.phases() if phase.iteration < done]
    taken_up = schedule.taken_up(past, done, schedule.samples_after(done))
    read = done // 3 * 2 * schedule.final_batch_size
    assert sample_counts(train, taken_up, validation_samples=read) == sample_counts(train, schedule)
