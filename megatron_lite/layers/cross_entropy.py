"""Vocabulary-parallel scores of tokens: logits are neither gathered nor kept in fp32 (arXiv:1909.08053 § 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lite.kernels.cross_entropy import LocalScores, VocabularyPart
from megatron_lite.layers.contexts import StageContext
from megatron_lite.parallel.collectives import MAX, all_reduce
from megatron_lite.parallel.context import Axis


class TokenScores(NamedTuple):
    """Of each token, fp32 [s, b], equal on all tp ranks: log p(label), and the entropy of what may come."""

    log_probabilities: Tensor
    entropies: Tensor


class Scoring(NamedTuple):
    """How logits [s, b, v/tp] are scored: over which ranks, and by which kernels."""

    tp: Axis
    vocab_size: int
    scores: Callable[..., LocalScores]
    gradients: Callable[..., Tensor]

    @classmethod
    def chosen(cls, context: StageContext) -> Scoring:
        """By the kernels of a stage."""
        kernels = (context.choose(op) for op in ("cross_entropy", "cross_entropy_gradients"))
        return cls(context.tp, context.vocab_size, *kernels)

    def part(self, logits: Tensor) -> VocabularyPart:
        """Which columns these are."""
        return VocabularyPart(self.tp.rank * logits.shape[-1], self.vocab_size)


class VocabularyScores(NamedTuple):
    """Of the whole vocabulary, fp32 [s, b] each.

    log_sum: log of the sum of the exponentials of the logits.
    offset: what the logits that were scored exceed log probabilities by; None: nothing.
    """

    losses: Tensor
    log_sum: Tensor
    offset: Tensor | None
    entropies: Tensor | None


def score(
    logits: Tensor, labels: Tensor, how: Scoring, *, entropy: bool = False
) -> VocabularyScores:
    """-log p(label), and the entropy where asked for; the logits are overwritten.

    Three numbers per token are reduced over tp: the largest log of a sum, the sum, the label's; for
    the entropy a fourth.  Padding takes no probability, so nothing depends on how far a layout pads.
    """
    part = how.part(logits)
    picked, log_sum, offset, negentropy = how.scores(logits, labels, part, entropy)
    if how.tp.size == 1:
        entropies = None if negentropy is None else -negentropy
        return VocabularyScores(-picked, log_sum, offset, entropies)
    log_sum = log_sum.contiguous()
    top = all_reduce(log_sum.clone(), how.tp, MAX)
    total = all_reduce((log_sum - top).exp(), how.tp).log().add_(top)
    shift = log_sum - total  # <= 0: what the other ranks' columns take away
    _, elsewhere = part.local(labels, logits.shape[-1])
    picked = all_reduce((picked + shift).masked_fill(elsewhere, 0.0), how.tp)
    if negentropy is not None:
        negentropy = all_reduce(shift.exp() * (negentropy + shift), how.tp)
    offset = -shift if offset is None else offset - shift
    return VocabularyScores(-picked, total, offset, None if negentropy is None else -negentropy)


def scored_again(logits: Tensor, labels: Tensor, how: Scoring, log_sum: Tensor) -> Tensor:
    """The offset of logits [s, b, v/tp] made a second time, which are overwritten; nothing is said over tp.

    log_sum: fp32 [s, b], of the first time.
    """
    _, local, offset, _ = how.scores(logits, labels, how.part(logits), False)
    shift = local - log_sum
    return -shift if offset is None else offset - shift


class _Scores(torch.autograd.Function):
    """Keeps the logits in their own format; backward writes their gradient over them."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, how: Scoring, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        logits = logits.detach()
        losses, _, offset, entropies = score(logits, labels, how, entropy=entropy)
        ctx.save_for_backward(logits, labels, offset, entropies)
        ctx.how = how
        return losses, entropies

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits, labels, offset, entropies = ctx.saved_tensors
        how: Scoring = ctx.how
        both = None if entropies is None else (entropies, dh)
        # in place: the graph runs backward once, and the product before it keeps no logits
        grad = how.gradients(logits, labels, how.part(logits), offset, dy, both)
        return grad, None, None, None


def token_losses(logits: Tensor, labels: Tensor, how: Scoring) -> Tensor:
    """logits: [s, b, v/tp], which are overwritten, labels: int64 [s, b] -> -log p, fp32 [s, b]."""
    losses: Tensor = _Scores.apply(logits, labels, how, False)[0]
    return losses


def token_scores(logits: Tensor, labels: Tensor, how: Scoring) -> TokenScores:
    """logits: [s, b, v/tp], which are overwritten, labels: int64 [s, b] -> both, fp32 [s, b]."""
    losses, entropies = _Scores.apply(logits, labels, how, True)
    return TokenScores(-losses, entropies)
