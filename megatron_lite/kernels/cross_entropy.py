"""Cross entropy of a part of the vocabulary, its gradient written over the logits (arXiv:1909.08053 § 3).

scores      logits -> fp32 numbers per token, of this rank's columns; layers/cross_entropy.py completes them
gradients   the same logits, as scores left them -> their gradient, in the same memory

Logits stay in the run's number format; what is computed of them is fp32, a block of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 2**24
"""Logits that are widened to fp32 at a time: 64 MiB."""


class VocabularyPart(NamedTuple):
    """Which columns of the vocabulary logits are: from `first` on; from vocab_size on they are padding."""

    first: int
    vocab_size: int

    def real(self, columns: int) -> int:
        """How many of so many columns are no padding."""
        return min(max(self.vocab_size - self.first, 0), columns)

    def local(self, labels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Labels as columns here, and which are elsewhere; those are column 0."""
        local = labels - self.first
        elsewhere = (local < 0) | (local >= columns)
        return local.masked_fill(elsewhere, 0), elsewhere


class LocalScores(NamedTuple):
    """Of one rank's columns, fp32 [s, b] each.

    picked: log probability of the label among them, meaningless where it is elsewhere.
    log_sum: log of the sum of their exponentials.
    offset: logits - offset are now their log probabilities among them; None: logits are.
    negentropy: sum of p log p among them, where it was asked for.
    """

    picked: Tensor
    log_sum: Tensor
    offset: Tensor | None
    negentropy: Tensor | None


def _padding_logit(dtype: torch.dtype) -> float:
    """Logit of padding columns: probability 0, but finite, so that an all-padding rank has a valid softmax."""
    return max(-1e30, torch.finfo(dtype).min)


def _mask_padding(logits: Tensor, part: VocabularyPart) -> None:
    real = part.real(logits.shape[-1])
    if real < logits.shape[-1]:
        logits[..., real:] = _padding_logit(logits.dtype)


def _blocks(logits: Tensor, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of logits [..., v] and of what is [...] beside them, as [rows, v] and [rows, 1] views."""
    rows = max(_BLOCK // logits.shape[-1], 1)
    flat = logits.view(-1, logits.shape[-1])
    columns = [x.reshape(-1, 1) for x in beside]
    for start in range(0, len(flat), rows):
        yield tuple(x[start : start + rows] for x in (flat, *columns))


def scores(logits: Tensor, labels: Tensor, part: VocabularyPart, entropy: bool) -> LocalScores:
    """logits: [s, b, v/tp], labels: int64 [s, b] of the whole vocabulary; overwrites the logits.

    fp32 logits become log probabilities: subtracting twice would round twice.
    """
    wide = logits.dtype == torch.float32
    _mask_padding(logits, part)
    local, _ = part.local(labels, logits.shape[-1])
    found: list[tuple[Tensor, ...]] = []
    for block, label in _blocks(logits, local):
        log_p = torch.log_softmax(block, dim=-1, dtype=torch.float32)
        numbers = [log_p.gather(-1, label), block[:, :1].float() - log_p[:, :1]]
        if entropy:
            numbers.append((log_p.exp() * log_p).sum(-1, keepdim=True))
        found.append(tuple(numbers))
        if wide:
            block.copy_(log_p)
    picked, log_sum, *more = (
        torch.cat(numbers).view(labels.shape) for numbers in zip(*found, strict=True)
    )
    return LocalScores(picked, log_sum, None if wide else log_sum, more[0] if more else None)


def gradients(
    logits: Tensor,
    labels: Tensor,
    part: VocabularyPart,
    offset: Tensor | None,
    dy: Tensor,
    entropy: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The gradient of -log p(label) times dy fp32 [s, b], written over the logits that scores() left.

    Those that scores_at_once() left do, too: padding is overwritten here as well.

    offset: logits - offset are log probabilities of the whole vocabulary.
    entropy: of each token, and its gradient, which is added.
    """
    _mask_padding(logits, part)
    local, elsewhere = part.local(labels, logits.shape[-1])
    beside = [local, elsewhere.float() - 1.0, dy]
    beside += [*(entropy or ()), *(() if offset is None else (offset,))]
    for block, label, minus_one, d_loss, *more in _blocks(logits, *beside):
        grad = block if logits.dtype == torch.float32 else block.float()
        if offset is not None:
            grad -= more[-1]
        if entropy is None:
            grad.exp_()
            grad.scatter_add_(-1, label, minus_one)
            grad *= d_loss
        else:  # dH/dlogit = -p (log p + H)
            factor = d_loss - more[1] * (grad + more[0])
            grad.exp_().mul_(factor)
            grad.scatter_add_(-1, label, minus_one * d_loss)
        if grad is not block:
            block.copy_(grad)
    return logits


def scores_at_once(
    logits: Tensor, labels: Tensor, part: VocabularyPart, entropy: bool
) -> LocalScores:
    """The same without blocks, to be compiled: fp32 only in registers, and the logits stay as they are."""
    wide = _masked(logits, part)
    log_sum = torch.logsumexp(wide, dim=-1)
    local, _ = part.local(labels, logits.shape[-1])
    picked = wide.gather(-1, local[..., None])[..., 0] - log_sum
    negentropy = None
    if entropy:
        log_p = wide - log_sum[..., None]
        negentropy = (log_p.exp() * log_p).sum(-1)
    return LocalScores(picked, log_sum, log_sum, negentropy)


def gradients_at_once(
    logits: Tensor,
    labels: Tensor,
    part: VocabularyPart,
    offset: Tensor | None,
    dy: Tensor,
    entropy: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The same without blocks, to be compiled: each logit is read once and written over."""
    local, elsewhere = part.local(labels, logits.shape[-1])
    log_p = _masked(logits, part)
    if offset is not None:
        log_p = log_p - offset[..., None]
    factor = dy[..., None]
    if entropy is not None:
        value, dh = entropy
        factor = factor - dh[..., None] * (log_p + value[..., None])
    columns = torch.arange(logits.shape[-1], device=logits.device)
    label = (columns == local[..., None]) & ~elsewhere[..., None]
    return logits.copy_(log_p.exp() * factor - torch.where(label, dy[..., None], 0.0))


def _masked(logits: Tensor, part: VocabularyPart) -> Tensor:
    """In fp32, padding as scores() has it."""
    real = torch.arange(logits.shape[-1], device=logits.device) < part.real(logits.shape[-1])
    return torch.where(real, logits.float(), _padding_logit(logits.dtype))
