"""What the last stage hands an objective: its head's outputs, made as far as the objective asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.cross_entropy import Scoring, TokenScores, token_losses, token_scores
from megatron_lite.layers.linear import Products, project_to_vocabulary, project_whole


class LossSum(NamedTuple):
    """total: an fp32 scalar with a gradient; losses: -log p of each token, fp32 [s, b], to be told."""

    total: Tensor
    losses: Tensor


@dataclass(frozen=True, slots=True)
class Outputs:
    """Logits, or what is wanted of them, without ever holding more of them than that needs.

    Each call multiplies with the head's matrix: ask once for what is needed.

    x: the final norm's output, [s/tp, b, h] with sequence parallelism, else [s, b, h];
    weight: [v/tp, h] of a vocabulary, else [n, h].
    """

    x: Tensor
    weight: Tensor
    context: StageContext
    products: Products
    scoring: Scoring

    def logits(self) -> Tensor:
        """[s, b, v/tp] of a vocabulary, padding included; [s, b, n] of another head."""
        vocabulary = self.context.figure.output.vocabulary
        project = project_to_vocabulary if vocabulary else project_whole
        return project(self.x, self.weight, self.context, self.products)

    def token_losses(self, labels: Tensor) -> Tensor:
        """labels: int64 [s, b] -> -log p(label), fp32 [s, b], equal on all tp ranks."""
        return token_losses(self.logits(), labels, self.scoring)

    def token_scores(self, labels: Tensor) -> TokenScores:
        """labels: int64 [s, b] -> log p(label) and the entropy of each token, fp32 [s, b]."""
        return token_scores(self.logits(), labels, self.scoring)

    def loss_sum(self, labels: Tensor, weights: Tensor) -> LossSum:
        """labels: int64 [s, b], weights: fp32 [s, b] without a gradient -> the sum of -log p(label)
        times weight."""
        losses = self.token_losses(labels)
        return LossSum((losses * weights).sum(), losses.detach())
