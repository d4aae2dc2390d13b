"""Reading Python files: what they import, what a name in them stands for, and all that are ours."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from tests.support.places import PACKAGE, ROOT

SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
Needs = dict[str, set[str]]


def parse(path: Path) -> ast.AST:
    """What a file says."""
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute, "" of anything else."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def other_names(tree: ast.AST) -> dict[str, str]:
    """Name in this file -> what it stands for: `import numpy as np`, `from torch import load`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, those inside functions and relative ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = path.relative_to(root.parent).with_suffix("").parts
                base = ".".join([*parts[: len(parts) - node.level], *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


@functools.cache
def modules_needed(root: Path) -> Needs:
    """Module of a package -> modules of it that are imported there, wherever in the file."""
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    needs: Needs = {}
    for name, path in files.items():
        found = {module for _, module in imports(path, root)}
        # `from a.b import c` reads as a.b.c: a module, or a name of a.b
        found = {module if module in files else module.rpartition(".")[0] for module in found}
        needs[name] = found & files.keys() - {name}
    return needs
