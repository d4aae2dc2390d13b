"""An objective from outside the package: --extend dataset.py objective.py --objective previous-token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_lite.config.objectives import OBJECTIVES, ObjectiveNeeds
from megatron_lite.data.batch import Batch
from megatron_lite.layers.cross_entropy import cross_entropy
from megatron_lite.parallel.context import Axis
from megatron_lite.pipeline.stage import MicroBatch, Scored
from megatron_lite.train.objectives.base import Metric
from megatron_lite.train.objectives.table import LOSSES


@dataclass(frozen=True, slots=True)
class PreviousToken:
    """Cross entropy in which a token counts for as much as has been seen before it."""

    tp: Axis
    vocab_size: int
    metrics: tuple[Metric, ...] = (Metric("surprise", mean=False),)

    def weight(self, batch: Batch) -> float:
        """How much of the batch counts, before anything is computed."""
        return float(np.sum(batch.loss_mask * batch.extras["along"], dtype=np.float64))

    def loss(self, outputs: Tensor, batch: MicroBatch) -> Scored:
        """outputs: logits [s, b, v/tp] -> the weighted sum; beside it the plain one."""
        losses = cross_entropy(outputs, batch.labels, self.tp, self.vocab_size) * batch.loss_mask
        share = batch.loss_mask * batch.extras["along"].t()  # [s, b]
        return Scored((losses * share).sum(), share.sum(), {"surprise": losses.sum()})


OBJECTIVES["previous-token"] = ObjectiveNeeds(dataset="reversed", head="vocabulary")
LOSSES["previous-token"] = lambda context: PreviousToken(context.tp, context.vocab_size)
