"""The curves are Megatron's: values recorded from megatron-core 0.16.1's scheduler."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.optim import LearningRateConfig, OptimConfig
from megatron_lite.config.sections.train import TrainConfig
from megatron_lite.optim.learning_rate import (
    DecayStyle,
    LearningRateSchedule,
    SamplesAfter,
    WeightDecaySchedule,
)

GPT3 = LearningRateConfig(
    lr=6.0e-5,
    min_lr=6.0e-6,
    lr_decay_style="cosine",
    lr_warmup_fraction=0.001,
    lr_decay_iters=430000,
)
BATCH = 1536
ITERATIONS = TrainConfig(train_iters=500000)


def batches(size: int) -> SamplesAfter:
    return lambda iterations: iterations * size


def gpt3() -> LearningRateSchedule:
    return LearningRateSchedule.from_config(GPT3, train=ITERATIONS, samples_after=batches(BATCH))


@pytest.mark.parametrize(
    ("iteration", "printed"),
    [
        (0, "0.000000E+00"),
        (1, "1.395349E-07"),
        (10, "1.395349E-06"),
        (215, "3.000000E-05"),
        (430, "6.000000E-05"),
        (430000, "6.000000E-06"),
        (430001, "6.000000E-06"),
        (500000, "6.000000E-06"),
    ],
)
def test_175b_run_has_megatrons_learning_rates(iteration: int, printed: str) -> None:
    assert f"{gpt3().at(iteration * BATCH):.6E}" == printed


def test_175b_run_has_megatrons_counters() -> None:
    assert gpt3().warmup_samples == 660_480
    assert gpt3().decay_samples == 660_480_000


# at samples 0, 50, 100, 550, 900, 1000, 1001 with warm-up 100, decay 1000, final part 200
RECORDED = {
    ("constant", "linear"): [0.0, 5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3],
    ("linear", "linear"): [0.0, 5e-4, 1e-3, 5.5e-4, 2e-4, 1e-4, 1e-4],
    ("cosine", "linear"): [0.0, 5e-4, 1e-3, 5.5e-4, 1.2713832e-4, 1e-4, 1e-4],
    ("inverse-square-root", "linear"): [
        0.0, 5e-4, 1e-3, 4.2640143e-4, 3.3333333e-4, 3.1622777e-4, 1e-4],
    ("WSD", "linear"): [0.0, 5e-4, 1e-3, 1e-3, 5.5e-4, 1e-4, 1e-4],
    ("WSD", "cosine"): [0.0, 5e-4, 1e-3, 1e-3, 5.5e-4, 1e-4, 1e-4],
    ("WSD", "exponential"): [0.0, 5e-4, 1e-3, 1e-3, 4.7279221e-4, 1e-4, 1e-4],
    ("WSD", "minus_sqrt"): [0.0, 5e-4, 1e-3, 1e-3, 3.6360390e-4, 1e-4, 1e-4],
}  # fmt: skip


@pytest.mark.parametrize(("styles", "expected"), list(RECORDED.items()))
def test_every_style_has_megatrons_values(styles, expected) -> None:
    schedule = LearningRateSchedule(
        max_lr=1e-3,
        min_lr=1e-4,
        style=styles[0],
        decay_samples=1000,
        warmup_samples=100,
        wsd_style=styles[1],
        wsd_samples=200,
    )
    got = [schedule.at(n) for n in (0, 50, 100, 550, 900, 1000, 1001)]
    assert got == pytest.approx(expected, rel=1e-7)


def test_every_style_of_the_configuration_is_covered() -> None:
    assert {style for style, _ in RECORDED} == set(get_args(DecayStyle))


def test_inverse_square_root_stops_at_the_minimum() -> None:
    schedule = LearningRateSchedule(
        max_lr=1e-3, min_lr=5e-4, style="inverse-square-root", decay_samples=1000, warmup_samples=10
    )
    assert schedule.at(40) == 5e-4 == schedule.at(900)
    assert schedule.at(20) == pytest.approx(1e-3 / math.sqrt(2))


def test_warm_up_starts_at_its_initial_value() -> None:
    lr = LearningRateConfig(lr=1e-3, lr_warmup_init=1e-5, lr_warmup_iters=10)
    schedule = LearningRateSchedule.from_config(
        lr, train=TrainConfig(train_iters=100), samples_after=batches(4)
    )
    assert schedule.at(0) == 1e-5
    assert schedule.at(20) == pytest.approx(5.05e-4)
    assert schedule.at(40) == 1e-3
    assert schedule.at(400) == pytest.approx(0.0, abs=1e-18)


def test_without_a_warm_up_the_first_step_has_the_peak() -> None:
    schedule = LearningRateSchedule.from_config(
        LearningRateConfig(lr=1e-3), train=TrainConfig(train_iters=10), samples_after=batches(4)
    )
    assert schedule.at(0) == 1e-3


def test_a_run_by_samples_equals_the_run_by_iterations() -> None:
    by_samples = LearningRateSchedule.from_config(
        LearningRateConfig(lr=1e-3, lr_decay_style="WSD", lr_warmup_samples=64,
                           lr_wsd_decay_samples=160),
        train=TrainConfig(train_samples=1600),
        samples_after=batches(16),
    )  # fmt: skip
    by_iterations = LearningRateSchedule.from_config(
        LearningRateConfig(lr=1e-3, lr_decay_style="WSD", lr_warmup_iters=4, lr_wsd_decay_iters=10),
        train=TrainConfig(train_iters=100),
        samples_after=batches(16),
    )
    assert by_samples == by_iterations


@pytest.mark.parametrize(
    ("lr", "words"),
    [
        (LearningRateConfig(), "--lr is missing"),
        (LearningRateConfig(lr=1e-4, min_lr=2e-4), "--min-lr 0.0002"),
        (LearningRateConfig(lr=1e-4, lr_warmup_init=2e-4), "--lr-warmup-init 0.0002"),
        (LearningRateConfig(lr=1e-4, lr_warmup_iters=100), "warm-up of 400 samples"),
        (LearningRateConfig(lr=1e-4, lr_decay_iters=0), "the decay is 0 samples"),
        (LearningRateConfig(lr=1e-4, lr_decay_style="WSD"), "--lr-wsd-decay-iters"),
        (
            LearningRateConfig(lr=1e-4, lr_decay_style="cosine", lr_restarts=79),
            "--lr-restarts 79 makes cycles of 5 samples, less than two steps of 4",
        ),
    ],
)
def test_a_curve_that_cannot_be_is_a_config_error(lr: LearningRateConfig, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LearningRateSchedule.from_config(
            lr, train=TrainConfig(train_iters=100), samples_after=batches(4)
        )
    assert words in str(caught.value)


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError, match="2 problems"):
        LearningRateSchedule.from_config(
            LearningRateConfig(lr=1e-4, min_lr=1.0, lr_warmup_iters=100),
            train=TrainConfig(train_iters=100),
            samples_after=batches(4),
        )


def test_a_run_without_a_length_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="--train-iters"):
        LearningRateSchedule.from_config(
            LearningRateConfig(lr=1.0), train=TrainConfig(), samples_after=batches(4)
        )


def weight_decay(**settings: object) -> WeightDecaySchedule:
    return WeightDecaySchedule.from_config(
        OptimConfig(**settings), train=TrainConfig(train_iters=100), samples_after=batches(12)
    )


def test_weight_decay_is_constant_unless_asked() -> None:
    assert {weight_decay(weight_decay=0.1).at(n) for n in (0, 600, 1200, 5000)} == {0.1}


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("linear", [0.01, 0.0325, 0.055, 0.1, 0.1]),
        ("cosine", [0.01, 0.0231801948, 0.055, 0.1, 0.1]),
    ],
)
def test_weight_decay_grows_as_megatrons(style: str, expected: list[float]) -> None:
    schedule = weight_decay(
        weight_decay_incr_style=style, start_weight_decay=0.01, end_weight_decay=0.1
    )
    got = [schedule.at(n) for n in (0, 300, 600, 1200, 1201)]
    assert got == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay_incr_style": "linear"},
        {"weight_decay_incr_style": "cosine", "start_weight_decay": 0.2, "end_weight_decay": 0.1},
        {"start_weight_decay": 0.2},
    ],
)
def test_contradicting_weight_decay_is_a_config_error(settings) -> None:
    with pytest.raises(ConfigError, match="weight-decay"):
        weight_decay(**settings)
