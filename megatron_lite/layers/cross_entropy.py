"""Vocabulary-parallel cross entropy that never gathers logits (arXiv:1909.08053 § 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lite.parallel.collectives import MAX, all_reduce
from megatron_lite.parallel.context import Axis


def _padding_logit(dtype: torch.dtype) -> float:
    """Logit of padding columns: probability 0, but finite, so that an all-padding rank has a valid softmax."""
    return max(-1e30, torch.finfo(dtype).min)


class _CrossEntropy(torch.autograd.Function):
    """Local log-softmax, then two numbers per token over tp: the log of the sum, and the target's."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tp: Axis, vocab_size: int) -> Tensor:
        columns = logits.shape[-1]
        first = tp.rank * columns
        real = min(max(vocab_size - first, 0), columns)
        if real < columns:
            logits = logits.clone()
            logits[..., real:] = _padding_logit(logits.dtype)
        log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)  # of this rank's columns
        local = labels - first
        elsewhere = (local < 0) | (local >= columns)
        local = local.masked_fill(elsewhere, 0)
        picked = log_p.gather(-1, local[..., None])[..., 0]
        if tp.size > 1:
            # log of this rank's sum of exponentials, from any column: logit - log_p
            log_sum = (logits[..., 0].float() - log_p[..., 0]).contiguous()
            top = all_reduce(log_sum.clone(), tp, MAX)
            total = all_reduce((log_sum - top).exp(), tp).log().add_(top)
            shift = log_sum - total  # <= 0: what the other ranks' columns take away
            picked = (picked + shift).masked_fill(elsewhere, 0.0)
            all_reduce(picked, tp)
            log_p += shift[..., None]
        ctx.save_for_backward(log_p, local, elsewhere)
        ctx.dtype = logits.dtype
        return -picked

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        log_p, local, elsewhere = ctx.saved_tensors
        grad = log_p.exp_()  # in place: the graph runs backward once
        grad.scatter_add_(-1, local[..., None], (elsewhere.float() - 1.0)[..., None])
        grad *= dy[..., None]
        return grad.to(ctx.dtype), None, None, None


def cross_entropy(logits: Tensor, labels: Tensor, tp: Axis, vocab_size: int) -> Tensor:
    """logits: [s, b, v/tp], labels: int64 [s, b] -> -log p, fp32 [s, b], equal on all tp ranks.

    Columns from vocab_size on are padding and take no probability, so the loss does not depend on
    how far a layout pads.
    """
    return _CrossEntropy.apply(logits, labels, tp, vocab_size)
