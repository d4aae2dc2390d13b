"""Files are written through storage/disk.py only, where a test can record, fail or crash them."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.architecture.source import dotted, parse
from tests.support.places import PACKAGE, ROOT

METHODS = {"write_text", "write_bytes", "tofile", "unlink", "rmdir", "touch", "symlink_to"}
CALLS = {
    "os.rename", "os.replace", "os.remove", "os.unlink", "os.rmdir", "os.write", "os.truncate",
    "os.ftruncate", "shutil.move", "shutil.copy", "shutil.copyfile", "shutil.copytree",
    "shutil.rmtree", "np.save", "np.savez", "torch.save", "numpy.save",
}  # fmt: skip
THE_PLACE = PACKAGE / "storage" / "disk.py"


def writes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of each call that changes a file or a folder."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name in CALLS or method in METHODS or name.endswith("save_file"):
            yield node.lineno, name or method
        elif name == "open" or method in ("open", "fdopen"):
            given = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
            modes = [a.value for a in given if isinstance(a, ast.Constant)]
            if any(isinstance(m, str) and set(m) <= set("rwxabt+") and set(m) & set("wxa+")
                   for m in modes):  # fmt: skip
                yield node.lineno, f"{name} for writing"


def test_only_the_disk_writes() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != THE_PLACE
        for line, what in writes(parse(path))
    ]
    assert found == []
    assert len(list(writes(parse(THE_PLACE)))) >= 5


@pytest.mark.parametrize(
    "source",
    [
        "open(p, 'w')",
        "open(p, mode='ab')",
        "p.open('r+b')",
        "p.write_text('a')",
        "os.replace(a, b)",
        "np.save(p, a)",
        "a.tofile(p)",
        "safetensors.torch.save_file(t, p)",
    ],
)
def test_a_write_is_found(source: str) -> None:
    assert len(list(writes(ast.parse(source)))) == 1


@pytest.mark.parametrize("source", ["open(p)", "open(p, 'rb')", "p.open('rt')", "disk.remove(p)"])
def test_reading_is_none(source: str) -> None:
    assert list(writes(ast.parse(source))) == []
