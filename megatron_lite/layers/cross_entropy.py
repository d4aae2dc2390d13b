"""Vocabulary-parallel cross entropy that never gathers logits (arXiv:1909.08053 § 3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from megatron_lite.kernels.cross_entropy import VocabularyPart, token_losses
from megatron_lite.parallel.collectives import MAX, all_reduce
from megatron_lite.parallel.context import Axis


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    tp: Axis,
    vocab_size: int,
    kernel: Callable[..., Tensor] = token_losses,
) -> Tensor:
    """logits: [s, b, v/tp], labels: int64 [s, b] -> -log p, fp32 [s, b], equal on all tp ranks.

    Columns from vocab_size on are padding and take no probability, so the loss does not depend on
    how far a layout pads.  kernel: the implementation that was chosen.
    """
    first = tp.rank * logits.shape[-1]
    if tp.size == 1:
        return kernel(logits, labels, VocabularyPart(first, vocab_size))
    largest, total = partial(all_reduce, axis=tp, op=MAX), partial(all_reduce, axis=tp)
    return kernel(logits, labels, VocabularyPart(first, vocab_size, largest, total))
