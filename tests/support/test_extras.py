"""What a test needs and lacks is a skip that says where it comes from; in `make nightly` a failure."""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import nightly
from tests.support import extras
from tests.support.extras import extra_of, named_in_setup, needs, needs_program
from tests.support.places import ROOT

OURS = {"megatron_lite", "tests", "benchmarks", "examples", "setup"}
ASKS = ("needs", "import_module", "__import__")


def called(node: ast.Call) -> str:
    """The last part of the called function's name."""
    return str(getattr(node.func, "id", "") or getattr(node.func, "attr", ""))


def third_parties(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of each import of what is neither Python's nor ours, and of each that is asked for."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        elif isinstance(node, ast.Call) and node.args and called(node) in ASKS:
            (first, *_) = node.args
            names = [first.value] if isinstance(first, ast.Constant) else []
        for name in names:
            first = name.partition(".")[0]
            if first not in sys.stdlib_module_names and first not in OURS:
                yield node.lineno, name


def test_every_library_that_tests_import_is_in_an_extra() -> None:
    unknown = []
    seen = set()
    for path in (ROOT / "tests").rglob("*.py"):
        if path == Path(__file__):
            continue
        for line, name in third_parties(ast.parse(path.read_text(encoding="utf-8"))):
            try:
                seen.add(extra_of(name))
            except LookupError as error:
                unknown.append(f"{path.relative_to(ROOT)}:{line}: {name}: {error}")
    assert unknown == [] and seen == {"", "test", "oracles"}


def test_who_lacks_a_library_says_so_in_one_way() -> None:
    ways = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr == "importorskip")
        or (
            isinstance(node, ast.ExceptHandler)
            and node.type
            and "ImportError" in ast.dump(node.type)
        )
    ]
    assert ways == []


def test_an_unknown_library_is_found() -> None:
    text = "import json, yaml\nfrom torch import nn\nimport nowhere.room\nneeds('other.one')\nneeds(name)"
    found = list(third_parties(ast.parse(text)))
    assert found == [(1, "yaml"), (2, "torch"), (3, "nowhere.room"), (4, "other.one")]
    with pytest.raises(LookupError, match="nowhere is in neither of setup.py's extras test and"):
        extra_of("nowhere.room")


def test_setup_installs_the_extra_test_and_nothing_else() -> None:
    script = (ROOT / "tools/setup.sh").read_text(encoding="utf-8")
    assert re.findall(r'-e "\.\[(.*)\]"', script) == ["test"]
    known = named_in_setup()
    assert {"pytest", "transformers", "megatron-core", "tokenizers"} <= set(known["test"])
    assert set(known["test"]) & set(known["oracles"]) == set()


def test_what_is_absent_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs("tokenizers").__name__ == "tokenizers"
    here = "pip install -e '.[{}]' in the checkout, or make {}".format
    for module, words in {
        "tokenizers": f"needs tokenizers: {here('test', 'setup')}",
        "megatron.core.datasets": f"needs megatron-core: {here('test', 'setup')}",
        "ray": f"needs ray: {here('oracles', 'setup-oracles')}",
    }.items():
        with monkeypatch.context() as without:
            first = module.partition(".")[0]
            for loaded in [name for name in sys.modules if name.startswith(f"{first}.")]:
                without.delitem(sys.modules, loaded)  # by another test of this process
            without.setitem(sys.modules, first, None)
            with pytest.raises(pytest.skip.Exception, match=re.escape(words) + "$"):
                needs(module)


def test_what_is_there_and_broken_is_no_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray.py").write_text("import what_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs"):
        needs("ray")


def test_a_program_of_the_environment_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras.sys, "executable", str(tmp_path / "python"))
    assert needs_program("sh", "dash") == extras.shutil.which("sh")
    (tmp_path / "sh").touch()
    assert needs_program("sh", "dash") == str(tmp_path / "sh")
    with pytest.raises(pytest.skip.Exception, match="needs no-such-program: apt-get install it"):
        needs_program("no-such-program", "apt-get install it")


def evaluate(expression: ast.expr, marks: set[str]) -> bool:
    """pytest's mark expressions, of names, and, or, not."""
    if isinstance(expression, ast.BoolOp):
        values = (evaluate(value, marks) for value in expression.values)
        return all(values) if isinstance(expression.op, ast.And) else any(values)
    if isinstance(expression, ast.UnaryOp):
        assert isinstance(expression.op, ast.Not)
        return not evaluate(expression.operand, marks)
    assert isinstance(expression, ast.Name)
    return expression.id in marks


def test_what_ci_and_nightly_select_is_every_test_once() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    selections = re.findall(r'^\t.*-m pytest -m "(.*)" \$\(PYTEST_ARGS\)$', makefile, re.MULTILINE)
    assert len(selections) == 2
    for part in nightly.PARTS.values():
        selections += [c[c.index("-m", 3) + 1] for c in part.commands if "pytest" in c]
    parsed = [ast.parse(selection, mode="eval").body for selection in selections]
    names = ("slow", "ci", "gpu", "cluster", "oracles", "root", "browser")
    for chosen in itertools.product([False, True], repeat=len(names)):
        marks = set(itertools.compress(names, chosen))
        taken = [s for s, tree in zip(selections, parsed, strict=True) if evaluate(tree, marks)]
        assert len(taken) == 1, (marks, taken)
    assert "test-all: test-ci test nightly " in makefile
