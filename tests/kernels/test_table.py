"""Every implementation of an op equals its reference, forward and backward; choices say why."""

from dataclasses import replace

import pytest
import torch

from megatron_lite.blueprint.figure.parts import Matrix
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.kernels import cross_entropy, reference
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.segments import Segments
from megatron_lite.kernels.table import PREFERENCES, TABLE, Implementation, Need, choose
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.linear import ColumnParallelLinear
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.planner.head import WIDENED_BYTES
from tests.support.kernels import INPUTS, MASKED, ON_A_CPU, arguments, run_with_gradients

CPU = torch.device("cpu")
HERE = [row for row in TABLE["attention"] if row.name not in ON_A_CPU]
"""Attention that runs on a CPU as it is."""
ROWS = [
    pytest.param(op, inputs, row, id=f"{inputs}-{row.name}")
    for op, rows in TABLE.items()
    for row in rows
    for inputs in INPUTS[op]
    if inputs in MASKED or not row.for_masks
]


@pytest.mark.parametrize(("op", "inputs", "row"), ROWS)
def test_every_implementation_equals_its_reference(
    op: str, inputs: str, row: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only a GPU has the kernel, what we make of its inputs and outputs; see ON_A_CPU."""
    reason = row.usable(Need(CPU, torch.float32, **MASKED.get(inputs, {})))
    if reason is not None and row.name not in ON_A_CPU:
        pytest.skip(reason)
    expected = run_with_gradients(TABLE[op][-1], inputs)
    ON_A_CPU.get(row.name, lambda patch: None)(monkeypatch)
    for ours, theirs in zip(run_with_gradients(row, inputs), expected, strict=True):
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
    for row in HERE:
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
    for row in HERE:
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


def test_a_row_for_another_storage_runs_the_layers_that_are_stored_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As int8 or fp8 weights would be: chosen once, by the layer's weight; the others keep theirs."""
    calls = []

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(weight.dtype)
        return reference.linear_forward(x, weight, bias)

    def usable(need: Need) -> str | None:
        return None if need.storage is torch.bfloat16 else "reads bf16 weights alone"

    rows = [Implementation("noted", noted, usable), *TABLE["linear_forward"]]
    monkeypatch.setitem(TABLE, "linear_forward", rows)
    model = ModelConfig(hidden_size=8, num_attention_heads=2, num_layers=1, seq_length=4)
    context = StageContext(model, ParallelContext.serial(), padded_vocab_size=8, vocab_size=8)
    plain = Matrix("up", (("up", 6),), 8, "rows", bias=True)
    stored = replace(plain, storage="bf16")
    layers = [ColumnParallelLinear(context, part) for part in (plain, stored)]
    monkeypatch.setitem(TABLE, "linear_forward", [])  # nothing is chosen any more
    for layer in layers:
        assert layer(torch.randn(4, 2, 8)).dtype == torch.float32
    assert calls == [torch.bfloat16]
    assert "linear_forward: noted" in context.kernels
    reason = "linear_forward: noted no (reads bf16 weights alone) -> reference"
    assert reason in context.kernels


def test_the_plan_counts_the_block_that_scores_widen() -> None:
    assert WIDENED_BYTES == 4 * cross_entropy._BLOCK
