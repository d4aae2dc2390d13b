"""What keeps a file readable and a package whole: lengths, no `global`, no two that need each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.architecture.source import Needs, modules_needed
from tests.support.places import PACKAGE, ROOT

FUNCTION_LINES, FILE_LINES = 80, 450
EVERYTHING = sorted(
    path
    for folder in ("megatron_lite", "tools", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every statement below; what is an expression holds none."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            found = getattr(node, name, ())
            stack += found if isinstance(found, list) else ()


def too_much(text: str) -> Iterator[tuple[int, str]]:
    """(line, what) of a long file, each long function and each `global`."""
    lines = len(text.splitlines())
    if lines > FILE_LINES:
        yield 1, f"{lines} lines"
    for node in statements(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield node.lineno, f"{node.name}() has {lines} lines"
        elif isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}"


def packages_needed(root: Path, modules: Mapping[str, set[str]]) -> Needs:
    """Folder -> folders; what lies in one folder is not apart from that folder's own files."""
    folders = {".".join(path.parent.relative_to(root.parent).parts) for path in root.rglob("*.py")}

    def holders(module: str) -> list[str]:
        return [f for f in folders if f == module or module.startswith(f"{f}.")]

    needs: Needs = {folder: set() for folder in folders}
    for module, needed in modules.items():
        for mine in holders(module):
            for other in (one for name in needed for one in holders(name)):
                if not f"{other}.".startswith(f"{mine}.") and not mine.startswith(f"{other}."):
                    needs[mine].add(other)
    return needs


def circle(needs: Mapping[str, set[str]]) -> list[str]:
    """Those on or between circles: who needs nobody, or whom nobody needs, is taken away in turn."""
    left = dict(needs)
    while True:
        needed = set().union(*left.values())
        kept = {name: one & left.keys() for name, one in left.items() if name in needed}
        kept = {name: one for name, one in kept.items() if one}
        if kept == left:
            return sorted(left)
        left = kept


def pairs(needs: Mapping[str, set[str]]) -> list[str]:
    """Two that need each other."""
    return [
        f"{a} <-> {b}" for a in sorted(needs) for b in sorted(needs[a]) if a < b and a in needs[b]
    ]


def test_no_function_or_file_is_too_long_and_nothing_is_global() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in EVERYTHING
        for line, what in too_much(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_no_two_packages_need_each_other() -> None:
    needs = packages_needed(PACKAGE, modules_needed(PACKAGE))
    assert pairs(needs) == []


def test_the_rooms_of_config_stand_on_each_other() -> None:
    needs = packages_needed(PACKAGE, modules_needed(PACKAGE))
    room = "megatron_lite.config.{}".format
    assert needs[room("sections")] == set()
    assert needs[room("deepspeed")] == {room("sections")}
    assert needs[room("flags")] == {room("sections"), room("deepspeed")}
    assert {room("sections"), room("flags")} <= needs[room("rules")]
    assert room("rules") not in set().union(*(needs[room(name)] for name in ("flags", "deepspeed")))


def test_no_files_need_each_other_in_a_circle() -> None:
    needs = modules_needed(PACKAGE)
    assert "megatron_lite.train.program" in needs["megatron_lite.cli.pretrain_gpt"]
    assert circle(needs) == []


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("def f():\n" + "    x = 1\n" * 79, []),
        ("def f():\n" + "    x = 1\n" * 80, [(1, "f() has 81 lines")]),
        ("x = 1\n" * 450, []),
        ("x = 1\n" * 451, [(1, "451 lines")]),
        ("async def f():\n    global x, y", [(2, "global x, y")]),
        ("match 1:\n  case _:\n    try: pass\n    except E:\n      global x", [(5, "global x")]),
    ],
)
def test_what_is_too_much_is_found(text: str, complaints: list[tuple[int, str]]) -> None:
    assert list(too_much(text)) == complaints


def test_a_pair_and_a_circle_are_found(tmp_path: Path) -> None:
    for file, text in {
        "a/one.py": "from p.b.room import two",
        "a/three.py": "",
        "b/room/two.py": "def late():\n    from p.a.three import x",
        "b/room/__init__.py": "from p.b import own",
        "b/own.py": "import p.c.four",
        "c/four.py": "from ..b.room.two import x",
    }.items():
        path = tmp_path / "p" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    modules = modules_needed(tmp_path / "p")
    assert modules["p.a.one"] == {"p.b.room.two"} and modules["p.b.room"] == {"p.b.own"}
    assert circle(modules) == []
    found = pairs(packages_needed(tmp_path / "p", modules))
    assert found == ["p.a <-> p.b", "p.a <-> p.b.room", "p.b <-> p.c"]


def test_a_circle_is_found_without_those_that_lead_to_it() -> None:
    needs = {"a": {"b"}, "b": {"c"}, "c": {"d", "e"}, "d": {"b"}, "e": set()}
    assert circle(needs) == ["b", "c", "d"]
