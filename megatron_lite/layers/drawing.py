"""Labels drawn from the model itself, over vocabulary-parallel logits (Gumbel-max; nothing is gathered).

The label with the largest logit - log E, E exponential, has the softmax's distribution.  E is a function
of seed, step, sample, token and the label's number: the same in every layout, as dropout is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lite.kernels.random import exponential, feature_bits
from megatron_lite.layers.cross_entropy import Scoring
from megatron_lite.parallel.collectives import MAX, all_reduce

_BLOCK_ON_CPU, _BLOCK = 1 << 17, 1 << 24
"""Logits whose noise is made at a time: what stays in a core's cache, or fills a device."""
_LOWEST = torch.iinfo(torch.int64).min


class LabelNoise(NamedTuple):
    """key: int64 scalar, the step's; tokens: int64 [s, b], a number for each token."""

    key: Tensor
    tokens: Tensor


@torch.no_grad()
def draw_labels(logits: Tensor, noise: LabelNoise, how: Scoring) -> Tensor:
    """logits: [s, b, v/tp], which stay as they are -> int64 [s, b], equal on all tp ranks.

    Padding is never drawn.  One collective of 8 bytes a token over tp.
    """
    part = how.part(logits)
    real = part.real(logits.shape[-1])
    flat, tokens = logits.reshape(-1, logits.shape[-1])[:, :real], noise.tokens.reshape(-1)
    best = torch.full_like(tokens, _LOWEST)
    if real:
        columns = torch.arange(part.first, part.first + real, device=logits.device)
        features = feature_bits(columns)
        at_once = max(1, (_BLOCK_ON_CPU if logits.device.type == "cpu" else _BLOCK) // real)
        for start in range(0, len(flat), at_once):
            here = slice(start, start + at_once)
            race = exponential(noise.key, tokens[here], features).log_()
            top = torch.sub(flat[here], race, out=race).max(dim=-1)
            best[here] = (_in_order(top.values) << 32) + (top.indices + part.first)
    best = all_reduce(best, how.tp, MAX)
    return (best & 0xFFFFFFFF).view(noise.tokens.shape)


def _in_order(values: Tensor) -> Tensor:
    """fp32 -> int64 of the same order: value and label are then one number, and one collective."""
    bits = values.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
