"""Pieces between two products, compiled: what a compiler may do, what it may not, and what if it fails."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.kernels.compiled import Compiler
from megatron_lite.kernels.table import TABLE, Implementation
from tests.support.kernels import arguments, run_with_gradients

PIECES = [(op, row) for op, rows in TABLE.items() for row in rows if row.fusible]
BACKENDS = [
    pytest.param("aot_eager", marks=pytest.mark.ci),
    pytest.param("inductor", marks=pytest.mark.slow),
]


def broken(graph: Any, inputs: Any) -> Any:
    """A backend that fails as one without a C++ compiler does."""
    raise OSError("no compiler here")


def breaks_in_backward(graph: Any, inputs: Any) -> Any:
    """A backend whose forward works, and whose backward cannot be compiled."""
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda gm, _: gm.forward, bw_compiler=broken)(graph, inputs)


def kept(run: Any, inputs: list[Any]) -> int:
    """Bytes that a call leaves for backward."""
    storages: dict[int, int] = {}

    def see(x: Tensor) -> Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(see, lambda x: x):
        result = run(*inputs)
    assert result is not None
    return sum(storages.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "row"), PIECES, ids=[op for op, _ in PIECES])
def test_a_compiled_piece_equals_its_reference(op: str, row: Implementation, backend: str) -> None:
    compiler = Compiler(backend)
    made = dataclasses.replace(row, run=compiler.piece(op, row.run))
    assert compiler.try_on(torch.device("cpu")) is None
    results = run_with_gradients(made, op)
    for ours, theirs in zip(results, run_with_gradients(row, op), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        if "dropout" in op:  # the same mask, bit for bit
            assert torch.equal(ours == 0.0, theirs == 0.0)
    assert compiler.failure is None


@pytest.mark.parametrize("op", ["dropout", "add_dropout", "add_dropout_layer_norm"])
def test_a_mask_is_made_again_in_backward_and_not_kept(op: str) -> None:
    """A byte of mask per value is kept by the row as it is; compiled, four per token."""
    inputs = arguments(op)
    mask, tokens = inputs[0].numel(), inputs[0].numel() // inputs[0].shape[-1]
    plain = kept(TABLE[op][-1].run, inputs)
    compiled = kept(Compiler("aot_eager").piece(op, TABLE[op][-1].run), inputs)
    features = inputs[0].shape[-1] * 4
    assert compiled == plain - mask + 4 * tokens + features


@pytest.mark.parametrize(
    "backend", [broken, breaks_in_backward], ids=lambda broken: broken.__name__
)
def test_a_compiler_that_fails_is_one_warning_and_the_rows_as_they_are(backend: Any) -> None:
    said: list[str] = []
    compiler = Compiler(backend, warn=said.append)
    assert "no compiler here" in (compiler.try_on(torch.device("cpu")) or "")
    for op, row in PIECES:
        made = dataclasses.replace(row, run=compiler.piece(op, row.run))
        for ours, theirs in zip(
            run_with_gradients(made, op), run_with_gradients(row, op), strict=True
        ):
            assert torch.equal(ours, theirs)
    (line,) = said
    assert "no compiler here" in line and "--no-torch-compile" in line
    # what is only unpacked has no backward
    reached = [op for op, _ in PIECES if backend is broken or op != "unpack_nf4"]
    assert f"on {reached[0]}" in line


def test_what_is_not_the_compilers_fault_is_not_laid_to_it() -> None:
    compiler = Compiler("aot_eager", warn=pytest.fail)
    norm = compiler.piece("layer_norm", TABLE["layer_norm"][-1].run)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm(torch.ones(2, 3), torch.ones(4), None, 1e-5)
    assert compiler.failure is None
