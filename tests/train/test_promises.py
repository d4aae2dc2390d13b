"""An objective that breaks its promises is refused with what is wrong, before its numbers are used."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.telemetry import TelemetryConfig
from megatron_lite.pipeline.stage import Scored
from megatron_lite.telemetry.record import StepRecord
from megatron_lite.telemetry.writers import STEP_SCALARS, scalars
from megatron_lite.train.objectives.base import Metric
from megatron_lite.train.objectives.promises import (
    make_objective,
    require_same_weight,
    scorer,
)
from megatron_lite.train.objectives.table import LOSSES
from tests.telemetry.records import STEP

ONE = torch.ones((), requires_grad=True)
GOOD = Scored(ONE, torch.ones(()), {"hits": torch.ones(())})


@dataclass(frozen=True)
class Answers:
    """What it is told to."""

    answer: Any
    metrics: tuple[Metric, ...] = (Metric("hits"),)

    def weight(self, batch) -> float:
        return 1.0

    def loss(self, outputs, batch):
        return self.answer


def test_a_sound_answer_is_handed_on() -> None:
    assert scorer(Answers(GOOD))(None, None) is GOOD


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ONE, r"Answers.loss\(\) .* returned a Tensor: it must be Scored"),
        (replace(GOOD, metrics={}), "has the metrics none, and `metrics` names hits"),
        (replace(GOOD, metrics={**GOOD.metrics, "best": ONE}), "has the metrics best, hits, and"),
        (replace(GOOD, total=ONE.expand(3)), r"total is a tensor \[3\], not a scalar"),
        (replace(GOOD, count=16.0), "count is 16.0, not a scalar tensor"),
        (replace(GOOD, metrics={"hits": 1.5}), "hits is 1.5, not a scalar tensor"),
        (replace(GOOD, total=ONE.detach()), "total has no gradient: it was detached"),
    ],
    ids=["tensor", "missing", "more", "vector", "number", "metric", "detached"],
)
def test_an_answer_of_another_form_is_refused(answer, said) -> None:
    with pytest.raises(ConfigError, match=said):
        scorer(Answers(answer))(None, None)


def test_a_detached_loss_is_well_in_an_evaluation() -> None:
    with torch.no_grad():
        scorer(Answers(replace(GOOD, total=ONE.detach())))(None, None)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (None, "LOSSES makes a NoneType for it, which has no metrics, weight, loss"),
        (Answers(None, (Metric("a"), Metric("a", mean=False))), "'a' is there twice"),
        (Answers(None, (Metric("lm loss"),)), "'lm loss' is a number of every run"),
    ],
    ids=["none", "twice", "ours"],
)
def test_what_is_no_objective_is_refused_by_its_name(monkeypatch, objective, said) -> None:
    monkeypatch.setitem(LOSSES, "mine", lambda context: objective)
    with pytest.raises(ConfigError, match=f"--objective mine: .*{said}"):
        make_objective("mine", None)


def test_an_objective_without_a_loss_is_refused_by_its_table() -> None:
    with pytest.raises(ConfigError, match="--objective mine: .* none of LOSSES"):
        make_objective("mine", None)


def test_names_of_a_step_are_those_that_metrics_may_not_take() -> None:
    """Every number of a step, each switch on."""
    switches = {
        f.name: True
        for f in fields(TelemetryConfig)
        if f.name.startswith("log_") and f.type == "bool"
    }
    whole = {f.name: 1.0 for f in fields(StepRecord) if getattr(STEP, f.name, None) is None}
    told = scalars(replace(STEP, **whole), replace(TelemetryConfig(), **switches))
    assert told.keys() == STEP_SCALARS


@pytest.mark.parametrize("weight", [1.0, 127.0, -128.0, float("nan")])
def test_a_weight_that_the_loss_does_not_count_is_refused(weight) -> None:
    with pytest.raises(ConfigError, match="add up to 128: both are what the loss is divided by"):
        require_same_weight(Answers(None), weight, 128.0)
    require_same_weight(Answers(None), 128.001, 128.0)
    require_same_weight(Answers(None), weight, 0.0)
