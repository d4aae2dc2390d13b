"""S2-attention: what each head sees, in every kernel; no token sees a later one, at no border of any group."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_lite.kernels import reference
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.segments import Segments
from megatron_lite.kernels.shifted import ShiftedGroups, shifted_sparse
from megatron_lite.kernels.table import TABLE
from tests.support.kernels import ON_A_CPU

S, D = 24, 16
BORDERS = [0, 5, 17, 24, 24, 36, 48]
"""Of documents in two rows, one of them empty; 12 is a border of groups, too."""
ROWS = [row for row in TABLE["attention"] if row.name != "torch-flex"]
"""FlexAttention's twin is slow, and has one case of its own."""


def who_sees_whom(heads: int, groups: ShiftedGroups, segments: Segments | None) -> Tensor:
    """bool [b, n, s, t], told pair by pair."""
    found = torch.zeros(2, heads, S, S, dtype=torch.bool)
    for row in range(2):
        borders = [] if segments is None else segments.cu_seqlens.tolist()
        documents = [sum(border <= row * S + i for border in borders) for i in range(S)]
        for head in range(heads):
            shift = 0 if head < groups.still else groups.size // 2
            for i in range(S):
                for j in range(i + 1):
                    together = (i + shift) // groups.size == (j + shift) // groups.size
                    found[row, head, i, j] = together and documents[i] == documents[j]
    return found


def masked(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention with a dense mask, spelled out."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return torch.softmax(scores.masked_fill(~allowed, -math.inf), -1) @ v


def drawn(heads: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, n, S, D, generator=generator, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    ]


def packed() -> Segments:
    return Segments(torch.tensor(BORDERS, dtype=torch.int32), 12, 2, S)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "groups"),
    [
        (4, 4, ShiftedGroups(8, 2)),
        (6, 2, ShiftedGroups(12, 3)),  # the border between the halves is that of two keys
        (6, 3, ShiftedGroups(4, 3)),  # and here lies within one
        (3, 1, ShiftedGroups(6, 1)),
        (2, 1, ShiftedGroups(8, 2)),  # the heads of a tp rank that has one half alone
        (2, 2, ShiftedGroups(8, 0)),
        (4, 2, ShiftedGroups(S, 2)),
    ],
)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_each_head_sees_its_groups_as_a_dense_mask_says(
    row, heads, kv_heads, groups, documents, monkeypatch
) -> None:
    ON_A_CPU.get(row.name, lambda patch: None)(monkeypatch)
    segments = packed() if documents else None
    results = []
    for attend in (
        lambda *qkv: shifted_sparse(row.run, groups, *qkv, AttentionCall(segments=segments)),
        lambda *qkv: masked(*qkv, who_sees_whom(heads, groups, segments)),
    ):
        tensors = drawn(heads, kv_heads)
        found = attend(*tensors)
        (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
        results.append([found, *(x.grad for x in tensors)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_flex_cuts_documents_once_more_where_groups_end(monkeypatch) -> None:
    (row,) = [row for row in TABLE["attention"] if row.name == "torch-flex"]
    ON_A_CPU[row.name](monkeypatch)
    groups, tensors = ShiftedGroups(12, 2), drawn(4, 2)
    found = shifted_sparse(row.run, groups, *tensors, AttentionCall(segments=packed()))
    expected = masked(*tensors, who_sees_whom(4, groups, packed()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("documents", [False, True])
def test_no_token_sees_a_later_one(documents) -> None:
    """In the paper the first tokens see the last ones, whose moved group wraps around."""
    call = AttentionCall(segments=packed() if documents else None)
    for i in range(S):
        q, k, v = drawn(4, 2)
        y = shifted_sparse(reference.attention, ShiftedGroups(8, 2), q, k, v, call)
        y[:, :, i].square().sum().backward()
        for x in (k, v):
            assert (x.grad[:, :, i + 1 :] == 0).all(), i
        assert (v.grad[:, :, i] != 0).any()


def test_documents_are_cut_once_for_all_layers() -> None:
    whole = packed()
    layers = whole.unmasked()
    cut = layers.within(8, 4)
    assert cut is layers.within(8, 4) and cut is not layers.within(8, 0)
    assert cut.cu_seqlens.tolist() == sorted([*BORDERS, 4, 12, 20, 28, 36, 44])
    assert cut.longest == 8 and replace(whole, longest=5).within(8, 4).longest == 5
    assert cut.block_mask() is whole.unmasked().within(8, 4).block_mask()
    assert cut.allowed is layers.within(8, 4).allowed
    assert whole.unmasked().within(8, 4).allowed is not cut.allowed, (
        "it lives as long as its layers"
    )
