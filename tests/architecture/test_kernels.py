"""Layers and models compute nothing that the kernel table has an op for, and choose when they are built."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.architecture.source import dotted, parse
from tests.support.places import PACKAGE

OPS = {
    "linear", "addmm", "addmm_", "mm", "matmul", "bmm", "baddbmm", "einsum", "layer_norm", "rms_norm",
    "gelu", "silu", "scaled_dot_product_attention",
}  # fmt: skip
"""Functions of torch that a kernel's reference is made of."""

METHODS = {"addmm_", "matmul", "mm"}
"""The same as methods of a tensor."""

PER_CALL = {"forward", "backward", "call", "__call__", "_call"}
"""Methods that run for every micro batch."""


def own_computing(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of products and pointwise ops spelled out, and of choices made anew in each call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
            yield node.lineno, "@"
        elif isinstance(node, ast.Call):
            owner, _, name = dotted(node.func).rpartition(".")
            of_torch = owner in ("F", "torch", "torch.nn.functional") and name in OPS
            if of_torch or (isinstance(node.func, ast.Attribute) and name in METHODS):
                yield node.lineno, name
        elif isinstance(node, ast.FunctionDef) and node.name in PER_CALL:
            for call in ast.walk(node):
                if isinstance(call, ast.Call):
                    last = dotted(call.func).rpartition(".")[2]
                    if last.startswith("choose") or last == "chosen":
                        yield call.lineno, f"{last} in {node.name}"


def test_layers_and_models_ask_the_table_when_they_are_built() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {what}"
        for folder in ("layers", "models")
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for line, what in own_computing(parse(path))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "dx = dy @ weight",
        "y = F.linear(x, w, b)",
        "total.addmm_(dy.t(), x)",
        "torch.nn.functional.gelu(x)",
        "class A:\n    def forward(self, x):\n        return choose('gelu', need).run(x)",
        "class A:\n    def forward(self, x):\n        return Products.chosen(context).forward(x)",
    ],
)
def test_what_a_layer_computes_by_itself_is_found(source: str) -> None:
    assert len(list(own_computing(ast.parse(source)))) == 1
