"""Learning rate and weight decay against the closed formulas in float64, and torch's own schedulers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.optim.learning_rate import LearningRateSchedule, WeightDecaySchedule
from tests.support.extras import needs

PEAK, LOW, START = 3e-3, 2e-4, 1e-5


def cosine(x: float) -> float:
    return (1.0 + math.cos(math.pi * x)) / 2.0


# share of (peak - low) that is left when x of the decay is done
SHARE = {"linear": lambda x: 1.0 - x, "cosine": cosine}
FINAL = {
    "linear": lambda x: 1.0 - x,
    "cosine": cosine,
    "exponential": lambda x: 2.0 * 2.0**-x - 1.0,
    "minus_sqrt": lambda x: 1.0 - math.sqrt(x),
}


def formula(
    style: str, n: int, warmup: int, decay: int, final: str, last: int, cycles: int
) -> float:
    if n <= warmup and warmup:
        return START + (PEAK - START) * n / warmup
    if style == "constant":
        return PEAK
    if n > decay:
        return LOW
    if style == "inverse-square-root":
        return max(LOW, PEAK * math.sqrt(max(warmup, 1) / max(n, 1)))
    if style == "WSD":
        past = n - (decay - last)
        return PEAK if past <= 0 else LOW + (PEAK - LOW) * FINAL[final](past / last)
    over, into = divmod(Fraction((n - warmup) * cycles, decay - warmup), 1)
    return LOW + (PEAK - LOW) * SHARE[style](1.0 if over == cycles else float(into))


@given(
    style=st.sampled_from(["constant", "linear", "cosine", "inverse-square-root", "WSD"]),
    final=st.sampled_from(sorted(FINAL)),
    warmup=st.integers(0, 1000),
    rest=st.integers(1, 10**6),
    last=st.integers(1, 10**6),
    cycles=st.integers(1, 9),
    where=st.floats(0.0, 1.2),
)
def test_the_curve_is_the_formula_everywhere(
    style, final, warmup, rest, last, cycles, where
) -> None:
    decay = warmup + rest
    last = min(last, rest)
    cycles = cycles if style == "cosine" else 1
    schedule = LearningRateSchedule(
        max_lr=PEAK, min_lr=LOW, style=style, decay_samples=decay, warmup_samples=warmup,
        warmup_init=START, wsd_style=final, wsd_samples=last, restarts=cycles - 1,
    )  # fmt: skip
    borders = {round(bend) + side for bend in schedule.bends() for side in (-1, 0, 1)}
    for n in {0, *(abs(border) for border in borders), int(where * decay)}:
        expected = formula(style, n, warmup, decay, final, last, cycles)
        assert schedule.at(n) == pytest.approx(expected, rel=1e-12)
        # one unit in the last place: the sum of the warm-up is Megatron's, rounding and all
        assert min(START, LOW) <= schedule.at(n) <= PEAK * (1 + 1e-15)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_warm_up_and_decay_are_torchs_schedulers_one_after_the_other(style) -> None:
    warmup, total = 20, 100
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    after = (
        torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=1.0, end_factor=LOW / PEAK, total_iters=total - warmup
        )
        if style == "linear"
        else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, eta_min=LOW)
    )
    rising = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=START / PEAK, end_factor=1.0, total_iters=warmup
    )
    theirs = torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, after], [warmup])
    ours = LearningRateSchedule(
        max_lr=PEAK, min_lr=LOW, style=style, decay_samples=total, warmup_samples=warmup,
        warmup_init=START,
    )  # fmt: skip
    for n in range(total + 1):
        assert ours.at(n) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), n
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("low", "cycles"), [(0.0, 1), (0.0, 3), (LOW, 4)])
def test_restarts_are_transformers_hard_restarts(low: float, cycles: int) -> None:
    """Their num_cycles is one more than our restarts; their floor is 0, ours --min-lr."""
    theirs_of = needs(
        "transformers.optimization"
    ).get_cosine_with_hard_restarts_schedule_with_warmup
    # 128 steps of decay: quotients by it are exact, also where a cycle begins
    warmup, total = 16, 144
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = theirs_of(optimizer, warmup, total, cycles)
    ours = LearningRateSchedule(
        max_lr=PEAK, min_lr=low, style="cosine", decay_samples=total, warmup_samples=warmup,
        restarts=cycles - 1,
    )  # fmt: skip
    peaks = 0
    for n in range(total + 3):
        share = optimizer.param_groups[0]["lr"]
        expected = low + (PEAK - low) * share if n >= warmup else PEAK * share
        assert ours.at(n) == pytest.approx(expected, rel=1e-12, abs=1e-18), n
        peaks += ours.at(n) == PEAK
        optimizer.step()
        theirs.step()
    assert cycles == 3 or peaks == cycles


@given(
    style=st.sampled_from(["linear", "cosine"]),
    start=st.floats(0.0, 0.1),
    growth=st.floats(0.0, 0.5),
    samples=st.integers(1, 10**6),
    where=st.floats(0.0, 1.2),
)
def test_weight_decay_is_the_formula_everywhere(style, start, growth, samples, where) -> None:
    end = start + growth
    schedule = WeightDecaySchedule(start=start, end=end, style=style, samples=samples)
    for n in {0, samples, samples + 1, int(where * samples)}:
        done = min(n / samples, 1.0)
        share = done if style == "linear" else 1.0 - cosine(done)
        expected = start + (end - start) * share
        assert schedule.at(n) == pytest.approx(expected, rel=1e-12, abs=1e-15)
