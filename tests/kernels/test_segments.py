"""Attention of packed documents by cumulative lengths is, to the bit, that of the dense mask they stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.segments import Segments
from megatron_lite.kernels.table import TABLE, Need

ROWS, LENGTH = 2, 9
BORDERS = {
    "whole rows": [0, 9, 18],
    "several": [0, 4, 9, 10, 13, 18],
    "single tokens": [*range(10), 18],
    "padded at the end": [0, 5, 9, 18, 18, 18],
}


def segments(borders: list[int]) -> Segments:
    longest = max(b - a for a, b in zip(borders, borders[1:], strict=False))
    return Segments(torch.tensor(borders, dtype=torch.int32), longest, ROWS, LENGTH)


def dense(borders: list[int]) -> Tensor:
    """bool [b, 1, s, s], query by query and key by key."""
    number = [sum(border <= at for border in borders) for at in range(ROWS * LENGTH)]
    return torch.tensor([
        [[[i >= j and number[row * LENGTH + i] == number[row * LENGTH + j] for j in range(LENGTH)]
          for i in range(LENGTH)]]
        for row in range(ROWS)
    ])  # fmt: skip


def spelled_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = (q * (1.0 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, -torch.inf).masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


WITH_A_MASK = {"torch-sdpa": fused, "reference": spelled_out}


def with_gradients(run: Any, *more: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(ROWS, heads, LENGTH, 8, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    )
    y = run(q, k, v, *more)
    (y * torch.linspace(0.0, 1.0, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS.keys())
@pytest.mark.parametrize("name", WITH_A_MASK)
def test_cumulative_lengths_equal_a_dense_mask_to_the_bit(name: str, borders: list[int]) -> None:
    (row,) = [row for row in TABLE["attention"] if row.name == name]
    assert row.usable(Need(torch.device("cpu"), torch.float32, segments=True)) is None
    ours = with_gradients(row.run, AttentionCall(segments=segments(borders)))
    theirs = with_gradients(WITH_A_MASK[name], dense(borders))
    assert len(ours) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS.keys())
def test_a_mask_is_made_once_and_only_where_it_is_asked_for(borders: list[int]) -> None:
    packed = segments(borders)
    assert "allowed" not in vars(packed)
    assert torch.equal(packed.allowed, dense(borders)) and packed.allowed is packed.allowed
    assert "allowed" not in vars(packed.unmasked()) and packed.cu_seqlens.dtype == torch.int32
