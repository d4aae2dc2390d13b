"""What tests share lies once, where a test may import it: in no test module."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source import imports, parse
from tests.support import axes
from tests.support.places import ROOT

TESTS = ROOT / "tests"
NODES = 12
"""A body of fewer nodes, as `return request.param`, may be written twice."""


def imports_of_test_modules(folder: Path) -> Iterator[str]:
    """path:line: module of every import from a test_*.py, or of a test itself."""
    for path in sorted(folder.rglob("*.py")):
        for line, module in imports(path, folder):
            first, *rest = module.split(".")
            if first == folder.name and any(part.startswith("test_") for part in rest):
                yield f"{path.relative_to(folder)}:{line}: {module}"


def helpers(folder: Path) -> Iterator[tuple[str, str]]:
    """(where, arguments and body without the docstring) of every function of a file that is no test."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("test_"):
                continue
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if sum(1 for statement in body for _ in ast.walk(statement)) >= NODES:
                names = [
                    argument.arg
                    for argument in ast.walk(node.args)
                    if isinstance(argument, ast.arg)
                ]
                said = "\n".join(ast.dump(statement) for statement in body)
                yield f"{path.relative_to(folder)}:{node.name}", f"{names}\n{said}"


def written_twice(folder: Path) -> list[list[str]]:
    """Places of each body that more than one helper has."""
    places: dict[str, list[str]] = defaultdict(list)
    for where, said in helpers(folder):
        places[said].append(where)
    return [found for found in places.values() if len(found) > 1]


def test_no_test_module_is_imported() -> None:
    found = list(imports_of_test_modules(TESTS))
    assert found == [], "what tests share belongs in tests/support, or in a file of their folder"


def test_no_helper_is_written_twice() -> None:
    assert written_twice(TESTS) == [], "what tests share belongs in tests/support"


def spelled_out(folder: Path) -> Iterator[str]:
    """path:line: text of every string that tests/support/axes.py has a name for."""
    names = {
        value for name, value in vars(axes).items() if name.isupper() and isinstance(value, str)
    }
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(parse(path)):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node.value in names
                and path.name != "axes.py"
            ):
                yield f"{path.relative_to(folder)}:{node.lineno}: {node.value}"


def test_an_axis_has_one_name() -> None:
    assert list(spelled_out(TESTS)) == [], "tests/support/axes.py has a short name for it"


@pytest.mark.parametrize(
    "line",
    ["from tests.data.test_kept import gpt2", "from tests.data import test_kept",
     "import tests.data.test_kept", "def f():\n    from .test_kept import gpt2"],
)  # fmt: skip
def test_an_import_of_a_test_module_is_found(tmp_path: Path, line: str) -> None:
    file = tmp_path / "tests" / "data" / "test_fit.py"
    file.parent.mkdir(parents=True)
    file.write_text(f"import json\n{line}\nfrom tests.support.test import x\n")
    (found,) = imports_of_test_modules(tmp_path / "tests")
    assert found.startswith(f"data/test_fit.py:{2 + line.count(chr(10))}: tests.data.test_kept")


def test_a_helper_written_twice_is_found(tmp_path: Path) -> None:
    body = "return [number * number for number in range(count)]\n"
    for name, text in {
        "test_a": f"def squares(count):\n    {body}",
        "test_b": f'def made(count: int) -> list[int]:\n    """Squares."""\n    {body}',
        "test_c": f"def other(count, start):\n    {body}",
        "test_d": f"def test_squares(count):\n    {body}",
        "test_e": "def short(a):\n    return a\n\n\ndef as_short(a):\n    return a\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert written_twice(tmp_path) == [["test_a.py:squares", "test_b.py:made"]]


def test_an_axis_spelled_out_is_found(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(f'"""About {axes.TP}."""\nchanges = {{"{axes.TP}": 2}}\n')
    assert list(spelled_out(tmp_path)) == [f"test_a.py:2: {axes.TP}"]
