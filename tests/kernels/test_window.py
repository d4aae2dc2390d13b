"""A window of attention: which keys a query sees, in every kernel that can, with segments and with a cache."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.segments import Segments
from megatron_lite.kernels.table import TABLE, Need, choose

CPU = Need(torch.device("cpu"), torch.float32, window=True)
ABLE = [row for row in TABLE["attention"] if row.usable(CPU) is None]
T = 9


def one_by_one(q, k, v, window, segment):
    """Every query by itself, by softmax over the keys that it sees."""
    out = torch.zeros_like(q)
    s, groups = q.shape[2], q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            for i in range(s):
                place = T - s + i
                seen = [
                    j for j in range(T) if place - window < j <= place
                    and segment[j] == segment[place]
                ]  # fmt: skip
                keys, values = k[b, head // groups, seen], v[b, head // groups, seen]
                weights = torch.softmax(keys @ q[b, head, i] / math.sqrt(q.shape[-1]), 0)
                out[b, head, i] = weights @ values
    return out


@pytest.mark.parametrize(
    ("queries", "documents"), [(1, False), (4, False), (T, False), (T, True)]
)  # segments are of whole rows
@pytest.mark.parametrize("window", [1, 3, 9, 40])
@pytest.mark.parametrize("row", ABLE, ids=lambda row: row.name)
def test_a_query_sees_its_window_alone(row, queries, window, documents):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, T, 8, generator=generator).double() for n in (4, 2, 2))
    q = q[:, :, T - queries :]
    segments, number = None, [0] * T
    if documents:
        segments = Segments(torch.tensor([0, 5, 9, 14, 18], dtype=torch.int32), 5, 2, T)
        number = [0] * 5 + [1] * 4
    found = row.run(q, k, v, AttentionCall(window=window, segments=segments, softmax_in_fp32=False))
    torch.testing.assert_close(found, one_by_one(q, k, v, window, number), rtol=1e-9, atol=1e-9)


def test_a_window_of_all_is_no_window():
    q, k, v = (torch.randn(1, n, T, 8) for n in (4, 2, 2))
    for row in ABLE:
        whole = row.run(q, k, v, AttentionCall())
        torch.testing.assert_close(row.run(q, k, v, AttentionCall(window=T)), whole)


def test_a_kernel_without_windows_says_so():
    gpu = dataclasses.replace(CPU, device=torch.device("cuda"), dtype=torch.bfloat16)
    choice = choose("attention", gpu)
    assert choice.implementation.name == "torch-sdpa"
    assert "flash-attn no (" in choice.why and "no window" in choice.why
