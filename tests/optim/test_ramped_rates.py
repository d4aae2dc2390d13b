"""A curve said in iterations, in samples or in tokens is one curve, however the batch grows."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_lite.blueprint.batches import batch_schedule
from megatron_lite.blueprint.length import run_length
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import parse
from megatron_lite.optim.learning_rate import LearningRateSchedule

LENGTH = 16
STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")


def ramps() -> st.SearchStrategy[str]:
    """Flags of a batch that grows in equal steps, as a table says, or not at all."""
    grown = st.builds(
        lambda first, by, times, samples: (
            f"--rampup-batch-size {first} {by} {samples} --global-batch-size {first + by * times}"
        ),
        st.integers(1, 8), st.integers(1, 8), st.integers(1, 6), st.integers(0, 400),
    )  # fmt: skip
    table = st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=4
    ).map(lambda rows: "--step-batch-size-schedule " + ",".join(
        f"{tokens}:{size}"
        for tokens, (_, size) in zip([0, *accumulate(LENGTH * gap for gap, _ in rows)], rows, strict=False)
    ))  # fmt: skip
    flat = st.integers(1, 40).map(lambda size: f"--global-batch-size {size}")
    return st.one_of(grown, table, flat)


class Run:
    """A command line's curve, and the samples after each of its steps."""

    def __init__(self, *words: str) -> None:
        config = parse(
            f"--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length {LENGTH} "
            f"--max-position-embeddings {LENGTH} --micro-batch-size 1 --lr 1e-3 --min-lr 1e-4 "
            f"{' '.join(words)}".split()
        ).config
        self.batches = batch_schedule(config.train, seq_length=LENGTH, dp=1)
        self.curve = LearningRateSchedule.from_config(
            config.learning_rate, config.train, self.batches.samples_after
        )
        length = run_length(config.train, self.batches)
        assert length is not None
        self.steps = length.iterations

    def rates(self) -> list[float]:
        """Before each step, and after the last."""
        return [self.curve.at(self.batches.samples_after(step)) for step in range(self.steps + 1)]


@given(
    ramp=ramps(),
    style=st.sampled_from(STYLES),
    steps=st.integers(12, 120),
    warmup=st.integers(0, 5),
    last=st.integers(1, 6),
    restarts=st.integers(0, 3),
)
def test_the_three_units_give_one_curve(ramp, style, steps, warmup, last, restarts) -> None:
    shape = [ramp, "--lr-decay-style", style]
    shape += ["--lr-restarts", str(restarts)] if style == "cosine" else []
    final = f"--lr-wsd-decay-iters {last}" if style == "WSD" else ""
    decay = steps - 3  # the last steps are after the decay
    try:
        by_steps = Run(*shape, f"--train-iters {steps} --lr-decay-iters {decay} "
                       f"--lr-warmup-iters {warmup}", final)  # fmt: skip
    except ConfigError:
        assume(not restarts)  # a cycle of less than two steps
        raise
    samples = by_steps.batches.samples_after
    final = f"--lr-wsd-decay-samples {samples(decay) - samples(decay - last)}" if final else ""
    in_samples = {"train": samples(steps), "lr-decay": samples(decay), "lr-warmup": samples(warmup)}
    by_samples = Run(*shape, *(f"--{name}-samples {n}" for name, n in in_samples.items()), final)
    by_tokens = Run(*shape, final, *(
        f"--{name}-tokens {n * LENGTH}" for name, n in in_samples.items() if n))  # fmt: skip
    assert by_samples.curve == by_steps.curve == by_tokens.curve
    assert by_samples.rates() == by_steps.rates() == by_tokens.rates()
    assert len(by_steps.rates()) == steps + 1


@given(
    ramp=ramps(),
    style=st.sampled_from(STYLES),
    steps=st.integers(12, 120),
    warmup=st.integers(1, 5),
    last=st.integers(1, 6),
)
def test_every_bend_lies_at_the_step_that_was_named(ramp, style, steps, warmup, last) -> None:
    final = f"--lr-wsd-decay-iters {last}" if style == "WSD" else ""
    run = Run(
        ramp, f"--train-iters {steps} --lr-warmup-iters {warmup} --lr-decay-style {style}", final
    )
    rates = run.rates()
    assert rates[0] == 0.0 and rates[warmup] == max(rates) == 1e-3
    assert all(before < after for before, after in pairwise(rates[: warmup + 1]))
    falling = rates[steps - last :] if style == "WSD" else rates[warmup:]
    if style == "constant":
        assert set(falling) == {1e-3}
    else:
        assert all(before > after or after == 1e-4 for before, after in pairwise(falling))
        assert style == "inverse-square-root" or rates[-1] == pytest.approx(1e-4)
    if style == "WSD":
        assert set(rates[warmup : steps - last + 1]) == {1e-3}


@given(ramp=ramps(), steps=st.integers(40, 200), restarts=st.integers(1, 4))
def test_cycles_are_equal_in_samples_and_each_begins_at_the_peak(ramp, steps, restarts) -> None:
    try:
        run = Run(ramp, f"--train-iters {steps} --lr-decay-style cosine --lr-restarts {restarts}")
    except ConfigError as error:
        assert "--lr-restarts" in str(error)
        return
    total = run.batches.samples_after(steps)
    rates = run.rates()
    for step, rate in enumerate(rates[:-1]):
        into = math.modf(run.batches.samples_after(step) * (restarts + 1) / total)[0]
        expected = 1e-4 + 9e-4 * (1 + math.cos(math.pi * into)) / 2
        near_a_restart = min(into, 1 - into) < 1e-9
        assert near_a_restart or rate == pytest.approx(expected, rel=1e-9)
    assert rates[0] == 1e-3 and rates[-1] == pytest.approx(1e-4)
    assert run.curve.bends() == pytest.approx(
        [total * k / (restarts + 1) for k in range(restarts + 2)]
    )
