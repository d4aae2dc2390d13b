"""Every module, public class and public function says what it is for."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.support.places import PACKAGE, ROOT

SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py")])
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def undocumented(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of what others may use and that has no docstring; a function's insides are its own.

    __init__ and its like are said by their class, and private classes by their code.
    """
    if not ast.get_docstring(tree):
        yield 1, "the module"
    stack: list[ast.Module | ast.ClassDef] = [tree]
    while stack:
        for node in stack.pop().body:
            if not isinstance(node, Documented) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                yield node.lineno, node.name
            if isinstance(node, ast.ClassDef):
                stack.append(node)


def repeats_its_name(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """First lines that say "This function" or only the name again."""
    for node in ast.walk(tree):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            first = text.splitlines()[0].strip(" .").lower()
            plain = node.name.strip("_").replace("_", " ").lower()
            if first.startswith(("this function", "this class", "this method")) or first == plain:
                yield node.lineno, node.name


def found_by(check) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in SOURCES
        for line, name in check(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_everything_public_has_a_docstring() -> None:
    assert found_by(undocumented) == []


def test_no_docstring_repeats_the_name() -> None:
    assert found_by(repeats_its_name) == []


def test_a_missing_docstring_is_found() -> None:
    source = (
        'class A:\n    """Says."""\n    def __init__(self): ...\n    def b(self): ...\n'
        "class _C:\n    def d(self): ...\n\ndef e():\n    def f(): ...\n"
    )
    assert list(undocumented(ast.parse(source))) == [(1, "the module"), (8, "e"), (4, "b")]
    assert list(repeats_its_name(ast.parse('def add_all():\n    """Add all."""'))) == [
        (1, "add_all")
    ]
