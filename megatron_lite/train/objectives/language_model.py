"""Next-token prediction: the sum of cross entropies over the tokens that count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_lite.data.batch import Batch
from megatron_lite.kernels.cross_entropy import token_losses
from megatron_lite.layers.cross_entropy import cross_entropy
from megatron_lite.parallel.context import Axis
from megatron_lite.pipeline.stage import MicroBatch, Scored
from megatron_lite.train.objectives.base import Metric


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """-log p(label) summed over the loss mask; equal on all tp ranks."""

    tp: Axis
    vocab_size: int
    kernel: Callable[..., Tensor] = token_losses
    metrics: tuple[Metric, ...] = ()

    def weight(self, batch: Batch) -> float:
        """Tokens that count."""
        return float(batch.loss_mask.sum(dtype="float64"))

    def loss(self, outputs: Tensor, batch: MicroBatch) -> Scored:
        """outputs: logits [s, b, v/tp] -> loss sum and token count, fp32 scalars."""
        losses = cross_entropy(outputs, batch.labels, self.tp, self.vocab_size, self.kernel)
        return Scored((losses * batch.loss_mask).sum(), batch.loss_mask.sum())
