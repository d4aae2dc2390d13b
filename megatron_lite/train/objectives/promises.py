"""What an objective promises, looked at where it is asked: whoever wrote one is told what is wrong with it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_lite.config.errors import ConfigError
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.outputs import Outputs
from megatron_lite.pipeline.stage import LossFunction, MicroBatch, Scored
from megatron_lite.telemetry.writers import STEP_SCALARS
from megatron_lite.train.objectives.base import Objective
from megatron_lite.train.objectives.table import LOSSES

_TOLERANCE = 1e-3
"""Between two sums of the same weights, one of them in fp32."""


def make_objective(name: str, context: StageContext) -> Objective:
    """The row of LOSSES.

    Raises ConfigError where there is none, for what lacks a part of the protocol, and for a metric
    that is named already.
    """
    if name not in LOSSES:
        raise ConfigError(
            f"--objective {name}: is a row of OBJECTIVES and none of LOSSES "
            f"({', '.join(LOSSES)}): how its loss is made; add one where the objective is added"
        )
    objective = LOSSES[name](context)
    lacks = [part for part in ("metrics", "weight", "loss") if not hasattr(objective, part)]
    if lacks:
        raise ConfigError(
            f"--objective {name}: LOSSES makes a {type(objective).__name__} for it, which has no "
            f"{', '.join(lacks)}; see Objective in megatron_lite/train/objectives/base.py"
        )
    names = Counter(metric.name for metric in objective.metrics)
    twice = [metric for metric, times in names.items() if times > 1]
    ours = [metric for metric in names if metric in STEP_SCALARS]
    if twice or ours:
        said = [f"{metric!r} is there twice" for metric in twice]
        said += [f"{metric!r} is a number of every run" for metric in ours]
        raise ConfigError(f"--objective {name}: of its metrics {'; '.join(said)}; name them apart")
    return objective


def scorer(objective: Objective) -> LossFunction:
    """Its loss, each answer of which is looked at: form and names, no number, so nothing is waited for."""
    names = {metric.name for metric in objective.metrics}
    of = f"{type(objective).__name__}.loss()"

    def score(outputs: Outputs, batch: MicroBatch) -> Scored:
        scored = objective.loss(outputs, batch)
        if not isinstance(scored, Scored):
            raise ConfigError(
                f"{of} of the objective returned a {type(scored).__name__}: it must be "
                "Scored(total, count, metrics)"
            )
        if set(scored.metrics) != names:
            raise ConfigError(
                f"{of} of the objective has the metrics {_listed(scored.metrics)}, and `metrics` "
                f"names {_listed(names)}: they must be the same"
            )
        parts = {"total": scored.total, "count": scored.count, **scored.metrics}
        for name, part in parts.items():
            if not isinstance(part, Tensor) or part.dim():
                form = f"a tensor {[*part.shape]}" if isinstance(part, Tensor) else repr(part)
                raise ConfigError(f"{of} of the objective: {name} is {form}, not a scalar tensor")
        if torch.is_grad_enabled() and not scored.total.requires_grad:
            raise ConfigError(
                f"{of} of the objective: total has no gradient: it was detached from the outputs"
            )
        return scored

    return score


def _listed(names: Mapping[str, object] | set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def require_same_weight(objective: Objective, weight: float, count: float) -> None:
    """Raise ConfigError where a step's weight() and the counts of its loss() are two numbers.

    The loss would be no mean, silently.  Nothing is said where nothing counts, or a count is not finite.
    """
    if not count or not math.isfinite(count):
        return
    if not abs(weight - count) <= _TOLERANCE * abs(count):
        kind = type(objective).__name__
        raise ConfigError(
            f"{kind}.weight() of the objective gives {weight:g} for a step (0 is taken as 1), and the "
            f"counts of {kind}.loss() add up to {count:g}: both are what the loss is divided by and "
            "must be the same"
        )
