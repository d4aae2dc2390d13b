"""What no file of the package does, and what every folder says about itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.floors import MAY_IMPORT
from tests.architecture.source import SOURCES, dotted, other_names, parse
from tests.support.places import PACKAGE, ROOT

FOLDERS = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
FORBIDDEN_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval", "exec", "builtins.eval", "builtins.exec", "torch.load", "torch.serialization.load",
    "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "os.system", "os.popen",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.distributed.checkpoint.load",
    "torch.distributed.checkpoint.FileSystemReader",
}  # fmt: skip
FORBIDDEN_KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}


def bad_habits(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of each global statement, unpickling, evaluation, shell and blind trust."""
    others = other_names(tree)

    def full(name: str) -> str:
        first, dot, rest = name.partition(".")
        return others.get(first, first) + dot + rest

    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                if name and name.split(".")[0] in FORBIDDEN_MODULES:
                    yield node.lineno, f"imports {name}"
        elif isinstance(node, ast.Call):
            called = full(dotted(node.func))
            if called in FORBIDDEN_CALLS:
                yield node.lineno, f"calls {called}"
            if called in ("__import__", "importlib.import_module") and node.args:
                (name, *_) = node.args
                if isinstance(name, ast.Constant) and name.value in FORBIDDEN_MODULES:
                    yield node.lineno, f"imports {ast.unparse(name)}"
            for word in node.keywords:
                on = isinstance(word.value, ast.Constant) and word.value.value is False
                if word.arg in FORBIDDEN_KEYWORDS and not on:
                    yield node.lineno, f"passes {word.arg}"


READS_THE_ENVIRONMENT = {
    "rendezvous/launch.py": "the one place that is told its rank",
    "rendezvous/copies.py": "finds, without torch, whether there are ranks that nobody numbered",
    "cli/launch.py": "torchrun takes its endpoint from flags alone, our users from MASTER_ADDR, too",
    "cli/calibrate.py": "hands its own on to the runs that it measures",
    "cli/plan.py": "hands its own on to the script whose command it asks for",
}


def environment_reads(tree: ast.AST) -> Iterator[int]:
    """Lines that read the environment; setting, deleting or providing a variable is not reading."""
    written = {
        node.value
        for node in ast.walk(tree)
        if (isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load))
        or (isinstance(node, ast.Attribute) and node.attr == "setdefault")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in written:
            if dotted(node) in ("os.environ", "os.getenv", "os.environb"):
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for a in node.names if a.name in ("environ", "getenv"))


def test_no_file_has_a_bad_habit() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in SOURCES
        for line, what in bad_habits(parse(path))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    global x",
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "torch.load(f)",
        "from torch import load\nload(f, weights_only=True)",
        "import torch as t\nt.load(f)",
        "from os import system as run\nrun('ls')",
        "import builtins\nbuiltins.eval('1')",
        "__import__('pickle')",
        "import importlib\nimportlib.import_module('_pickle')",
        "run(a, shell=True)",
        "np.load(f, allow_pickle=flag)",
    ],
)
def test_a_bad_habit_is_found(source: str) -> None:
    assert len(list(bad_habits(ast.parse(source)))) == 1


def test_only_launch_reads_the_environment() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if list(environment_reads(parse(path)))
    }
    assert found == READS_THE_ENVIRONMENT.keys()


def test_reading_the_environment_is_found_and_setting_it_is_not() -> None:
    reads = ["os.environ['RANK']", "os.environ.get('A')", "os.getenv('A')", "'A' in os.environ"]
    assert [len(list(environment_reads(ast.parse(line)))) for line in reads] == [1, 1, 1, 1]
    sets = ["os.environ['A'] = 'false'", "del os.environ['A']", "os.environ.setdefault('A', 'b')"]
    assert [list(environment_reads(ast.parse(line))) for line in sets] == [[], [], []]


def test_no_file_or_folder_is_a_box_of_leftovers() -> None:
    names = {part for path in SOURCES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert names & FORBIDDEN_NAMES == set()


def test_every_folder_has_its_floor_and_no_floor_is_deeper_than_two() -> None:
    for folder in FOLDERS:
        parts = folder.relative_to(PACKAGE).parts
        assert parts[0] in MAY_IMPORT
        assert len(parts) <= 2


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_a_folder_says_what_is_here_what_it_imports_and_where_to_begin(folder: Path) -> None:
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    assert len(re.findall(r"[.;:](?:\s|$)", text)) >= 3, "three sentences"
    if folder.parent != PACKAGE:
        return
    assert re.search(r"\bimports?\b", text, re.IGNORECASE), "what it may import"
    begin = re.search(r"Begin with (\S+\.py)", text)
    assert begin, "where to begin reading"
    assert (folder / begin[1]).is_file(), f"{begin[1]} does not exist"
