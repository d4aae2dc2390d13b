"""The Objective protocol: what the training step asks of whatever is optimised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_lite.data.batch import Batch
from megatron_lite.layers.outputs import Outputs
from megatron_lite.pipeline.stage import MicroBatch, Scored


@dataclass(frozen=True, slots=True)
class Metric:
    """A number beside the loss: summed over the micro batches and ranks of a step.

    mean: the sum is divided by the step's weight, as the loss is; else it is told as it is.
    """

    name: str
    mean: bool = True


class Objective(Protocol):
    """A loss as a sum over a step, divided by a weight that is known before the first forward.

    Gradients of micro batches and ranks then add up to that of the mean, in every layout.
    """

    @property
    def metrics(self) -> Sequence[Metric]:
        """What every answer of loss() holds beside the sum, in the order in which it is told."""
        ...

    def weight(self, batch: Batch) -> float:
        """What a micro batch on the host contributes to the normaliser; summed over dp, a step's."""
        ...

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Scored:
        """Loss sum, weight and metrics of the last stage's outputs, equal on all tp ranks.

        outputs: what the objective's head makes, computed as far as is asked (layers/outputs.py).
        The weight is that of weight() again, as an fp32 scalar.
        """
        ...


def finished(objective: Objective, sums: Sequence[float], weight: float) -> dict[str, float]:
    """Its metrics by name, from their sums in the objective's order; nan where nothing counts."""
    found = zip(objective.metrics, sums, strict=True)
    return {
        metric.name: (total / weight if weight else math.nan) if metric.mean else total
        for metric, total in found
    }
