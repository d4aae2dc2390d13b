"""Each step is made with the learning rate and weight decay of the samples before it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_lite.engines.base import Engine, Update
from megatron_lite.engines.table import ENGINES
from tests.train.runs import alone, steps

PEAK, LOW, START, END = 1e-2, 1e-3, 0.01, 0.3
CURVES = [
    "--lr-warmup-iters", "2", "--min-lr", str(LOW), "--train-iters", "6",
    "--weight-decay-incr-style", "linear", "--start-weight-decay", str(START),
    "--end-weight-decay", str(END),
]  # fmt: skip


def learning_rate(samples: int, warmup: int = 8, length: int = 24) -> float:
    """Six steps of four samples: warm-up over 8, cosine over the other 16."""
    if samples <= warmup:
        return PEAK * samples / warmup
    done = (samples - warmup) / (length - warmup)
    return LOW + (PEAK - LOW) * (1.0 + math.cos(math.pi * done)) / 2.0


def weight_decay(samples: int, length: int = 24) -> float:
    return START + (END - START) * samples / length


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, bool]]:
    """(learning rate, weight decay, skipped) of every step; a skipped one uses neither."""
    calls: list[tuple[float, float, bool]] = []
    make = ENGINES["zero"]

    def made(*args: Any, **settings: Any) -> Engine:
        engine = make(*args, **settings)
        apply, discard = engine.apply, engine.discard

        def applied(norm: Tensor, *, lr: float, weight_decay: float, decoupled_lr: None) -> Update:
            calls.append((lr, weight_decay, False))
            return apply(norm, lr=lr, weight_decay=weight_decay)

        def discarded(norm: Tensor) -> Update:
            calls.append((math.nan, math.nan, True))
            return discard(norm)

        engine.apply, engine.discard = applied, discarded  # type: ignore[method-assign, assignment]
        return engine

    monkeypatch.setitem(ENGINES, "zero", made)
    return calls


def require(
    used: list[tuple[float, float, bool]], before: list[int], warmup: int = 8, length: int = 24
) -> None:
    """Every update was made with the values of so many samples; a skipped step used none."""
    for (lr, decay, skipped), samples in zip(used, before, strict=True):
        if not skipped:
            assert lr == pytest.approx(learning_rate(samples, warmup, length))
            assert decay == pytest.approx(weight_decay(samples, length))


def test_a_step_uses_the_values_of_the_samples_before_it(used, data: list[str]) -> None:
    assert alone(*data, *CURVES).rc == 0
    require(used, [0, 4, 8, 12, 16, 20])


def test_the_log_shows_the_value_of_the_samples_after_it(data: list[str], folder: Path) -> None:
    assert alone(*data, *CURVES, "--save", str(folder), "--save-interval", "99").rc == 0
    shown = [record.learning_rate for record in steps(folder)]
    assert shown == pytest.approx([learning_rate(n) for n in (4, 8, 12, 16, 20, 24)])


def test_a_resumed_run_goes_on_where_the_curves_were(used, data: list[str], folder: Path) -> None:
    words = [*data, *CURVES, "--save", str(folder), "--save-interval", "3"]
    assert alone(*words, "--exit-interval", "3").rc == 0
    assert alone(*words, "--load", str(folder)).rc == 0
    require(used, [0, 4, 8, 12, 16, 20])


def test_a_batch_ramp_moves_them_by_its_samples(used, data: list[str]) -> None:
    ramp = ["--rampup-batch-size", "2", "2", "6", "--micro-batch-size", "1"]
    assert alone(*data, *CURVES, *ramp).rc == 0
    # two samples a step until six are consumed, then four
    require(used, [0, 2, 4, 6, 10, 14], warmup=4, length=18)


def test_a_step_that_fp16_skips_moves_neither(used, data: list[str]) -> None:
    fp16 = ["--fp16", "--initial-loss-scale", "4e6", "--hysteresis", "1"]
    assert alone(*data, *CURVES, *fp16).rc == 0
    skipped = [skip for _, _, skip in used]
    assert skipped[0] and not all(skipped), "some overflow, some do not"
    before = [4 * (k - sum(skipped[:k])) for k in range(len(used))]
    require(used, before)
