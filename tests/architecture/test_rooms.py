"""No two packages import each other, nor any files around others; rooms know their house by its nouns."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.architecture.test_floors import PACKAGE, imports

Graph = dict[Path, set[Path]]

NOUNS = {
    ("train/health", "train"): {"run"},  # Run: what every question of these rooms is about
    ("train/ending", "train"): {"run"},
    ("blueprint/schedules", "blueprint"): {"stages"},  # where a stage sits
}
"""(room, its house) -> the only files of the house that it imports, although the house imports it."""


def imported(root: Path) -> Graph:
    """File -> files of the package it imports, annotations and functions included."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        found[path] = set()
        for _, module in imports(path, root):
            parts = module.split(".")
            if parts[0] != root.name:
                continue
            for names in (parts, parts[:-1]):  # a module, or a name in one
                file = root.parent.joinpath(*names)
                if file.with_suffix(".py").is_file():
                    found[path].add(file.with_suffix(".py"))
                    break
                if (file / "__init__.py").is_file() and len(names) > 1:
                    found[path].add(file / "__init__.py")
                    break
        found[path].discard(path)
    return found


def two_way(graph: Graph, root: Path) -> dict[tuple[str, str], set[str]]:
    """(inner, outer) packages that import each other -> files of the outer that the inner imports."""
    between: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path, targets in graph.items():
        for target in targets:
            here, there = (p.parent.relative_to(root).as_posix() for p in (path, target))
            if here != there:
                between[here, there].add(target.stem)
    return {
        (a, b): files
        for (a, b), files in between.items()
        if (b, a) in between and (a.count("/"), a) > (b.count("/"), b)
    }


def circle(graph: Graph, root: Path) -> list[str]:
    """Files that import each other, if any do."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [file.relative_to(root).as_posix() for file in error.args[1]]
    return []


def test_no_packages_and_no_files_import_each_other_but_a_room_its_houses_noun() -> None:
    graph = imported(PACKAGE)
    assert two_way(graph, PACKAGE) == NOUNS
    assert circle(graph, PACKAGE) == []


@pytest.mark.parametrize("where", ["import at the top", "import in a function"])
def test_a_circle_and_a_two_way_pair_are_found(tmp_path: Path, where: str) -> None:
    root = tmp_path / "house"
    late = "def f():\n    " if "function" in where else ""
    for name, text in {
        "__init__": "", "a/__init__": "", "b/__init__": "", "a/x/__init__": "",
        "a/one": "from house.b.two import g\n", "b/two": f"{late}from house.a.x import three\n",
        "a/x/three": "from house.a import one\n",
    }.items():  # fmt: skip
        file = root / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert set(circle(imported(root), root)) == {"a/one.py", "b/two.py", "a/x/three.py"}
    assert two_way(imported(root), root) == {}
    (root / "a" / "four.py").write_text("from house.a.x.three import h\n")
    assert two_way(imported(root), root) == {("a/x", "a"): {"one"}}


def test_a_session_is_opened_where_it_is_described_in_a_handful_of_named_steps() -> None:
    tree = ast.parse((PACKAGE / "train" / "session.py").read_text(encoding="utf-8"))
    (opening,) = (
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "open_session"
    )
    assert "Session" in {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
    called = [ast.unparse(n.func) for n in ast.walk(opening) if isinstance(n, ast.Call)]
    steps = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)} & set(called)
    assert 5 <= len(steps) <= 8 and set(called) - steps == {"draw_up"}
