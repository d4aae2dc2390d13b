"""Cross entropy of a part of the vocabulary, completed by the other ranks (arXiv:1909.08053 § 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class VocabularyPart(NamedTuple):
    """Which columns of the vocabulary logits are, and how the ranks that hold the others are asked.

    first: the global number of the first column; columns from vocab_size on are padding.
    largest, total: all-reduce fp32 [s, b] in place over those ranks; None where all columns are here.
    """

    first: int
    vocab_size: int
    largest: Callable[[Tensor], Tensor] | None = None
    total: Callable[[Tensor], Tensor] | None = None


def _padding_logit(dtype: torch.dtype) -> float:
    """Logit of padding columns: probability 0, but finite, so that an all-padding rank has a valid softmax."""
    return max(-1e30, torch.finfo(dtype).min)


class _CrossEntropy(torch.autograd.Function):
    """Local log-softmax, then two numbers per token over tp: the log of the sum, and the target's."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, part: VocabularyPart) -> Tensor:
        columns = logits.shape[-1]
        first = part.first
        real = min(max(part.vocab_size - first, 0), columns)
        if real < columns:
            logits = logits.clone()
            logits[..., real:] = _padding_logit(logits.dtype)
        log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)  # of this rank's columns
        local = labels - first
        elsewhere = (local < 0) | (local >= columns)
        local = local.masked_fill(elsewhere, 0)
        picked = log_p.gather(-1, local[..., None])[..., 0]
        if part.total is not None and part.largest is not None:
            # log of this rank's sum of exponentials, from any column: logit - log_p
            log_sum = (logits[..., 0].float() - log_p[..., 0]).contiguous()
            top = part.largest(log_sum.clone())
            total = part.total((log_sum - top).exp()).log().add_(top)
            shift = log_sum - total  # <= 0: what the other ranks' columns take away
            picked = (picked + shift).masked_fill(elsewhere, 0.0)
            picked = part.total(picked)
            log_p += shift[..., None]
        ctx.save_for_backward(log_p, local, elsewhere)
        ctx.dtype = logits.dtype
        return -picked

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        log_p, local, elsewhere = ctx.saved_tensors
        grad = log_p.exp_()  # in place: the graph runs backward once
        grad.scatter_add_(-1, local[..., None], (elsewhere.float() - 1.0)[..., None])
        grad *= dy[..., None]
        return grad.to(ctx.dtype), None, None


def token_losses(logits: Tensor, labels: Tensor, part: VocabularyPart) -> Tensor:
    """logits: [s, b, v/tp], labels: int64 [s, b] of the whole vocabulary -> -log p, fp32 [s, b]."""
    return _CrossEntropy.apply(logits, labels, part)
