"""Next-token prediction: the sum of cross entropies over the tokens that count."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.data.batch import Batch
from megatron_lite.layers.outputs import Outputs
from megatron_lite.pipeline.stage import MicroBatch, Scored
from megatron_lite.train.objectives.base import Metric


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """-log p(label) summed over the loss mask; equal on all tp ranks."""

    metrics: tuple[Metric, ...] = ()

    def weight(self, batch: Batch) -> float:
        """Tokens that count."""
        return float(batch.loss_mask.sum(dtype="float64"))

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Scored:
        """Loss sum and token count, fp32 scalars."""
        found = outputs.loss_sum(batch.labels, batch.loss_mask)
        return Scored(found.total, batch.loss_mask.sum())
