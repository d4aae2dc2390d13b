"""Every implementation of an op equals its reference, forward and backward; choices say why."""

import pytest
import torch

from megatron_lite.kernels import reference
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.segments import Segments
from megatron_lite.kernels.table import PREFERENCES, TABLE, Implementation, Need, choose
from tests.support.kernels import arguments, run_with_gradients

CPU = torch.device("cpu")
COMPILED = "torch-compile"
ROWS = [
    # a C++ compiler for each: minutes together
    pytest.param(op, row, id=f"{op}-{row.name}", marks=[pytest.mark.slow] * (row.name == COMPILED))
    for op, rows in TABLE.items()
    for row in rows
]


@pytest.mark.parametrize(("op", "row"), ROWS)
def test_every_implementation_equals_its_reference(op: str, row: Implementation) -> None:
    reason = row.usable(Need(CPU, torch.float32, compile=True))
    if reason is not None:
        pytest.skip(reason)
    expected = run_with_gradients(TABLE[op][-1], op)
    for ours, theirs in zip(run_with_gradients(row, op), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_sdpa_equals_the_spelled_out_attention():
    sdpa = next(row for row in TABLE["attention"] if row.name == "torch-sdpa")
    expected = run_with_gradients(TABLE["attention"][-1], "attention")
    for ours, theirs in zip(run_with_gradients(sdpa, "attention"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 3])
def test_a_cached_prefix_is_aligned_bottom_right(queries):
    q, k, v, call = arguments("attention")
    whole = reference.attention(q, k, v, call)[:, :, -queries:]
    for row in TABLE["attention"][1:]:
        torch.testing.assert_close(row.run(q[:, :, -queries:], k, v, call), whole)


def test_layer_scaling_changes_only_the_range():
    q, k, v, _ = arguments("attention")
    plain = reference.attention(q, k, v, AttentionCall())
    scaled = reference.attention(q, k, v, AttentionCall(layer_scale=7.0))
    torch.testing.assert_close(plain, scaled)


def test_segments_keep_documents_apart():
    q, k, v, _ = arguments("attention")
    segments = Segments(torch.tensor([0, 4, 9, 13, 18], dtype=torch.int32), 5, rows=2, length=9)
    alone = reference.attention(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], AttentionCall())
    for row in TABLE["attention"][1:]:
        together = row.run(q, k, v, AttentionCall(segments=segments))
        torch.testing.assert_close(together[:, :, 4:], alone)


def test_the_choice_says_why_the_others_do_not_run():
    choice = choose("attention", Need(CPU, torch.float32), PREFERENCES["auto"])
    assert choice.implementation.name == "torch-sdpa"
    assert "flash-attn no (needs a GPU)" in choice.why
    assert (
        choose("attention", Need(CPU, torch.float32, dropout=0.1)).implementation.name
        == "reference"
    )


def test_every_op_has_a_reference_that_is_always_usable():
    for op, rows in TABLE.items():
        assert rows[-1].name == "reference", op
        assert rows[-1].usable(Need(CPU, torch.float32, 0.1, True, True)) is None
