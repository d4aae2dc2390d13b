"""A public name means one thing: no class, function, alias or constant is defined in two modules."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.support.places import PACKAGE

CONTRACT = {"main", "start", "parse_arguments"}
"""What every command in cli/ has, because tools/*.py and its tests call it by these names."""


def public_names(tree: ast.Module) -> Iterator[str]:
    """Names without an underscore that a module's top level defines; imports define nothing."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [one.id for one in node.targets if isinstance(one, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def defined_twice(package: Path) -> dict[str, list[str]]:
    """Public name -> the modules that define it, of each name that more than one defines."""
    where: dict[str, set[str]] = defaultdict(set)
    for path in package.rglob("*.py"):
        file = path.relative_to(package).as_posix()
        for name in public_names(ast.parse(path.read_text(encoding="utf-8"))):
            if not (file.startswith("cli/") and name in CONTRACT):
                where[name].add(file)
    return {name: sorted(files) for name, files in sorted(where.items()) if len(files) > 1}


def test_no_public_name_is_defined_twice() -> None:
    assert defined_twice(PACKAGE) == {}


def test_a_name_of_two_modules_is_found(tmp_path: Path) -> None:
    (tmp_path / "cli").mkdir()
    (tmp_path / "one.py").write_text(
        "from os import path\nclass Part: ...\n_A = 1\nKINDS: int = 2\n"
    )
    (tmp_path / "two.py").write_text("from os import path\nPart = int\n_A = 1\nKINDS = 3\n")
    for file in ("cli/a.py", "cli/b.py"):
        (tmp_path / file).write_text("def main(): ...\n")
    assert defined_twice(tmp_path) == {name: ["one.py", "two.py"] for name in ("KINDS", "Part")}
