"""Cross entropy of labels that are drawn from the model itself (arXiv:2305.14342, section 2.3).

Such gradients of different tokens are independent and zero in the mean: the square of their mean's,
times the tokens, is an unbiased estimate of the Gauss-Newton matrix' diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_lite.kernels.random import token_numbers
from megatron_lite.layers.drawing import LabelNoise
from megatron_lite.layers.outputs import Outputs
from megatron_lite.pipeline.stage import MicroBatch, Scored
from megatron_lite.train.objectives.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class DrawnLabels(LanguageModel):
    """Of the tokens that count in the loss; key: int64 scalar on the device, the step's."""

    key: Tensor | None = None

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Scored:
        """Loss sum and token count, fp32 scalars."""
        assert self.key is not None
        at = batch.positions
        noise = LabelNoise(self.key, token_numbers(at.samples, at.index))
        found = outputs.drawn_loss_sum(noise, batch.loss_mask)
        return Scored(found.total, batch.loss_mask.sum())
