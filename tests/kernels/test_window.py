"""A window of attention: which keys a query sees, in every kernel that can, with segments and with a cache."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megatron_lite.kernels import documents, reference
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.segments import Segments
from megatron_lite.kernels.table import PREFERENCES, TABLE, Need, choose
from tests.support.kernels import ON_A_CPU, varlen_on_a_cpu

CPU = Need(torch.device("cpu"), torch.float32, window=True)
ABLE = [row for row in TABLE["attention"] if row.usable(CPU) is None]
TWINS = [row for row in TABLE["attention"] if row.name in ON_A_CPU and row.name != "torch-flex"]
"""Of GPU kernels; FlexAttention's is slow, and has whole rows alone (tests/kernels/test_table.py)."""
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
    ("queries", "packed"), [(1, False), (4, False), (T, False), (T, True)]
)  # segments are of whole rows
@pytest.mark.parametrize("window", [1, 3, 9, 40])
@pytest.mark.parametrize("row", [*TWINS, *ABLE], ids=lambda row: row.name)
def test_a_query_sees_its_window_alone(row, queries, window, packed, monkeypatch):
    ON_A_CPU.get(row.name, lambda patch: None)(monkeypatch)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, T, 8, generator=generator).double() for n in (4, 2, 2))
    q = q[:, :, T - queries :]
    segments, number = None, [0] * T
    if packed:
        segments = Segments(torch.tensor([0, 5, 9, 14, 18], dtype=torch.int32), 5, 2, T)
        number = [0] * 5 + [1] * 4
    found = row.run(q, k, v, AttentionCall(window=window, segments=segments, softmax_in_fp32=False))
    torch.testing.assert_close(found, one_by_one(q, k, v, window, number), rtol=1e-9, atol=1e-9)


def test_a_window_of_all_is_no_window():
    q, k, v = (torch.randn(1, n, T, 8) for n in (4, 2, 2))
    for row in ABLE:
        whole = row.run(q, k, v, AttentionCall())
        torch.testing.assert_close(row.run(q, k, v, AttentionCall(window=T)), whole)


def test_flex_leaves_tokens_behind_a_cache_to_a_dense_mask(monkeypatch):
    monkeypatch.setattr(documents, "compiled_flex", lambda: pytest.fail("asked with a cache"))
    q, k, v = (torch.randn(1, 2, length, 8) for length in (4, T, T))
    call = AttentionCall(window=3)
    torch.testing.assert_close(documents.flex(q, k, v, call), reference.attention(q, k, v, call))


def test_torch_2_10_has_no_window_and_says_so(monkeypatch):
    gpu = dataclasses.replace(CPU, device=torch.device("cuda"), dtype=torch.bfloat16)
    for version, name in (("2.12", "torch-varlen"), ("2.10", "torch-sdpa")):
        varlen_on_a_cpu(monkeypatch, version)
        choice = choose("attention", gpu, PREFERENCES["fused"])
        assert choice.implementation.name == name
    assert "torch-varlen no (has no window before torch 2.11)" in choice.why
