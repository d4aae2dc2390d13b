"""An engine is used through its protocol alone, and its class is named in ENGINES alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source import imports
from tests.support.places import PACKAGE, ROOT

BASE = PACKAGE / "engines" / "base.py"
OPEN = {"base", "table", "loss_scale"}
"""Modules of engines/ that anybody above may import."""

INSIDE = {
    "tests/engines/test_buckets.py": "which axis a bucket is summed over",
    "tests/engines/test_clip.py": "the norm's formula",
    "tests/engines/test_deepspeed.py": "a range of elements as boxes",
    "tests/engines/test_gathering.py": "in which order gathers start",
    "tests/engines/test_matrices.py": "what an owner sees of a matrix",
    "tests/gpu/test_offload.py": "how many elements are updated at a time",
    "tests/engines/test_offload.py": "how many elements are updated at a time",
    "tests/engines/test_shards.py": "the layout of a bucket",
    "tests/engines/test_whole.py": "in which order weights are made whole",
    "tests/optim/test_frozen.py": "when a bucket starts",
    "tests/parity/test_overlap.py": "what waits too long",
    "tests/pipeline/test_reduction_order.py": "when a bucket starts",
}
"""Tests that import other modules of engines/, for what they hold still; never a whole engine."""

ENGINE = "tests/engines/apart.py"
"""An engine itself, for tests."""

TOKENIZERS = (
    "megatron_lite/data/",
    "megatron_lite/cli/preprocess",
    "tests/data/",
    "benchmarks/bench_data_",
)
"""Where an engine is a library that tokenizes."""


def protocol() -> set[str]:
    """Every name of base.Engine."""
    (found,) = (
        node for node in ast.parse(BASE.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "Engine"
    )  # fmt: skip
    methods = {node.name for node in found.body if isinstance(node, ast.FunctionDef)}
    fields = {ast.unparse(node.target) for node in found.body if isinstance(node, ast.AnnAssign)}
    return methods | fields


def is_engine(node: ast.expr, others: set[str]) -> bool:
    """Whether an expression is an engine: `engine`, `run.engine`, or a name that stands for one."""
    if isinstance(node, ast.Attribute):
        return node.attr == "engine"
    return isinstance(node, ast.Name) and node.id in {"engine"} | others


def other_names(function: ast.AST) -> set[str]:
    """Names that a function gives an engine: `held = run.engine`, `held = ENGINES[name](...)`."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value
            called = value.func if isinstance(value, ast.Call) else value
            made = isinstance(called, ast.Subscript) and ast.unparse(called.value) == "ENGINES"
            if made or is_engine(value, set()):
                found.add(node.targets[0].id)
    return found


def strange_uses(tree: ast.Module, *, patches: bool) -> Iterator[tuple[int, str]]:
    """(line, what) of each use of an engine beside its protocol; patches: setting a method is one."""
    names = protocol()
    scopes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    for scope in (tree, *scopes):
        others = other_names(scope) if scope is not tree else set()
        for node in ast.walk(scope):
            if isinstance(node, ast.Attribute) and is_engine(node.value, others):
                if node.attr not in names:
                    yield node.lineno, f"uses .{node.attr} of an engine"
                elif patches and not isinstance(node.ctx, ast.Load):
                    yield node.lineno, f"changes .{node.attr} of an engine"
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("getattr", "setattr", "vars")
                and is_engine(node.args[0], others)
            ):
                yield node.lineno, f"{node.func.id} of an engine"


def sources() -> Iterator[tuple[str, Path]]:
    """(name, file) of everything outside engines/ that may meet an engine."""
    for folder in ("megatron_lite", "tools", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(("megatron_lite/engines/", ENGINE, *TOKENIZERS)):
                yield name, path


def test_nobody_uses_more_of_an_engine_than_its_protocol() -> None:
    found = {
        f"{name}:{line}: {what}"
        for name, path in sources()
        if re.search(r"\bengine\.|\.engine\b|ENGINES", text := path.read_text(encoding="utf-8"))
        for line, what in strange_uses(ast.parse(text), patches=name.startswith("megatron_lite/"))
    }
    assert found == set()


def test_an_engines_class_is_named_in_the_table_alone() -> None:
    found = [
        f"{name}:{line}: imports {module}"
        for name, path in sources()
        if "megatron_lite.engines" in path.read_text(encoding="utf-8")
        for line, module in imports(path, ROOT / "megatron_lite")
        if module.startswith("megatron_lite.engines.")
        and module.split(".")[2] not in OPEN
        and (name not in INSIDE or module.split(".")[2] == "zero")
    ]
    assert found == []


def test_weights_of_a_run_are_read_through_its_engine() -> None:
    """Slices of the modules' own parameters are for what has no engine: a model that generates."""
    readers = {
        name
        for name, path in sources()
        if name.startswith("megatron_lite/") and "weight_slices" in path.read_text(encoding="utf-8")
    }
    assert readers == {"megatron_lite/parallel/shard.py", "megatron_lite/inference/model.py"}


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("run.engine._held", "uses ._held of an engine"),
        ("def f(self):\n    self.run.engine.rule.update()", "uses .rule of an engine"),
        ("def f(run):\n    e = run.engine\n    e._buckets", "uses ._buckets of an engine"),
        ("def f():\n    made = ENGINES['zero'](a)\n    made.sharded", "uses .sharded of an engine"),
        ("getattr(run.engine, name)", "getattr of an engine"),
        ("run.engine.reduce = mine", "changes .reduce of an engine"),
    ],
)
def test_a_strange_use_is_found(source: str, complaint: str) -> None:
    assert {what for _, what in strange_uses(ast.parse(source), patches=True)} == {complaint}


def test_what_the_protocol_names_is_no_strange_use() -> None:
    source = (
        "def f(run):\n    run.engine.wait_for_param_gather()\n    return run.engine.scaler.scale"
    )
    assert list(strange_uses(ast.parse(source), patches=True)) == []
