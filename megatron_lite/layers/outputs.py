"""What the last stage hands an objective: its head's outputs, made as far as the objective asks for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from megatron_lite.layers import chunks
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.cross_entropy import Scoring, TokenScores, token_losses, token_scores
from megatron_lite.layers.drawing import LabelNoise, draw_labels
from megatron_lite.layers.linear import project_to_vocabulary, project_whole
from megatron_lite.layers.product import Products, column_comm


class LossSum(NamedTuple):
    """total: an fp32 scalar with a gradient; losses: -log p of each token, fp32 [s, b], to be told."""

    total: Tensor
    losses: Tensor


@dataclass(frozen=True, slots=True)
class Outputs:
    """Logits, or what is wanted of them, without ever holding more of them than that needs.

    Each call multiplies with the head's matrix: ask once for what is needed.

    x: the final norm's output, [s/tp, b, h] with sequence parallelism, else [s, b, h];
    weight: [v/tp, h] of a vocabulary, else [n, h]; expected: see expecting().
    """

    x: Tensor
    weight: Tensor
    context: StageContext
    products: Products
    scoring: Scoring
    expected: Tensor | None = None

    def expecting(self, scale: Tensor | None) -> Outputs:
        """The same, whose loss will be multiplied by scale; None: not known, or in an evaluation."""
        return replace(self, expected=scale)

    @property
    def num_chunks(self) -> int:
        """In how many chunks of tokens losses and scores are computed (--logits-chunk-mib)."""
        at = self.context
        length = self.x.shape[0] * (at.tp.size if at.sequence_parallel else 1)
        position = self.x.shape[1] * self.weight.shape[0] * self.x.element_size()
        return at.logits_budget.chunks(length, position)

    def logits(self) -> Tensor:
        """[s, b, v/tp] of a vocabulary, padding included; [s, b, n] of another head."""
        vocabulary = self.context.figure.output.vocabulary
        project = project_to_vocabulary if vocabulary else project_whole
        return project(self.x, self.weight, self.context, self.products)

    def token_losses(self, labels: Tensor) -> Tensor:
        """labels: int64 [s, b] -> -log p(label), fp32 [s, b], equal on all tp ranks."""
        if self.num_chunks == 1:
            return token_losses(self.logits(), labels, self.scoring)
        return chunks.chunked_scores(self.x, self.weight, labels, self._chunked(), entropy=False)[0]

    def token_scores(self, labels: Tensor) -> TokenScores:
        """labels: int64 [s, b] -> log p(label) and the entropy of each token, fp32 [s, b]."""
        if self.num_chunks == 1:
            return token_scores(self.logits(), labels, self.scoring)
        losses, entropies = chunks.chunked_scores(
            self.x, self.weight, labels, self._chunked(), entropy=True
        )
        assert entropies is not None, "they were asked for"
        return TokenScores(-losses, entropies)

    def loss_sum(self, labels: Tensor, weights: Tensor) -> LossSum:
        """labels: int64 [s, b], weights: fp32 [s, b] without a gradient -> the sum of -log p(label)
        times weight.  The cheapest in chunks: nothing is computed twice."""
        if self.num_chunks == 1:
            losses = self.token_losses(labels)
            return LossSum((losses * weights).sum(), losses.detach())
        expected = self.expected if self.expected is not None else weights.new_ones(())
        return LossSum(
            *chunks.chunked_loss_sum(
                self.x, self.weight, labels, weights, expected, self._chunked()
            )
        )

    def drawn_loss_sum(self, noise: LabelNoise, weights: Tensor) -> LossSum:
        """The same of labels that are drawn from the outputs themselves; weights as in loss_sum."""
        if self.num_chunks > 1:
            drawn = chunks.chunked_labels(self.x, self.weight, noise, self._chunked())
            return self.loss_sum(drawn, weights)
        logits = self.logits()
        labels = draw_labels(logits, noise, self.scoring)
        losses = token_losses(logits, labels, self.scoring)
        return LossSum((losses * weights).sum(), losses.detach())

    def _chunked(self) -> chunks.ChunkedHead:
        at = self.context
        return chunks.ChunkedHead(
            self.num_chunks, column_comm(at), self.products, self.scoring, at.gradients
        )
