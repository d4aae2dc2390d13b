"""An objective from outside the package: --extend dataset.py objective.py --objective previous-token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_lite.config.objectives import OBJECTIVES, ObjectiveNeeds
from megatron_lite.data.batch import Batch
from megatron_lite.layers.outputs import Outputs
from megatron_lite.pipeline.stage import MicroBatch, Scored
from megatron_lite.train.objectives.base import Metric
from megatron_lite.train.objectives.table import LOSSES


@dataclass(frozen=True, slots=True)
class PreviousToken:
    """Cross entropy in which a token counts for as much as has been seen before it."""

    metrics: tuple[Metric, ...] = (Metric("surprise", mean=False),)

    def weight(self, batch: Batch) -> float:
        """How much of the batch counts, before anything is computed."""
        return float(np.sum(batch.loss_mask * batch.extras["along"], dtype=np.float64))

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Scored:
        """The weighted sum; beside it the plain one."""
        share = batch.loss_mask * batch.extras["along"].t()  # [s, b]
        total, losses = outputs.loss_sum(batch.labels, share)
        return Scored(total, share.sum(), {"surprise": (losses * batch.loss_mask).sum()})


OBJECTIVES["previous-token"] = ObjectiveNeeds(dataset="reversed", head="vocabulary")
LOSSES["previous-token"] = lambda context: PreviousToken()
