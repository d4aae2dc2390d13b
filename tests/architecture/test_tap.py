"""One tap: whoever talks to other ranks tells the axis' observer first, and an axis has no other ear."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields

import pytest

from megatron_lite.parallel.context import Axis, ParallelContext
from megatron_lite.parallel.observer import Observer
from tests.architecture.source import dotted, other_names, parse
from tests.support.places import PACKAGE

TALK = re.compile(
    r"torch\.distributed\.((all_|reduce_)?(reduce|gather|scatter|to_all)\w*|broadcast\w*|barrier"
    r"|monitored_barrier|i?send\w*|i?recv\w*|P2POp)"
)
SILENT = {
    "parallel/context.py connect_neighbours": "before there is an axis to observe",
}
"""Functions that talk and tell nobody -> why."""


def talking(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(function, call) of every call that reaches other ranks through torch without telling first."""
    others = other_names(tree)
    made = {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and re.search(r"dist\.\w+_(into_)?tensor", ast.unparse(node.value))
    }
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    for function in functions:
        called = [dotted(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)]
        if any(name == "_asked" or name.endswith("observer.before") for name in called):
            continue
        for name in called:
            first, dot, rest = name.partition(".")
            if TALK.fullmatch(others.get(first, first) + dot + rest) or name in made:
                yield function.name, name


def test_whoever_talks_to_other_ranks_tells_the_observer_first() -> None:
    found = {
        f"{path.relative_to(PACKAGE).as_posix()} {function}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if "distributed" in path.read_text(encoding="utf-8")
        for function, _ in talking(parse(path))
    }
    assert found == set(SILENT)


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist\ndef f(): dist.all_reduce(x)",
        "from torch.distributed import isend\ndef f(): isend(x, 1)",
        "import torch.distributed as dist\ndef f(): dist.P2POp(dist.irecv, x, 1)",
        "_into = dist.reduce_scatter_tensor\ndef f(): _into(out, x)",
        "from torch import distributed\ndef f(): distributed.broadcast_object_list(x)",
    ],
)
def test_talk_behind_the_observers_back_is_found(source: str) -> None:
    assert len(list(talking(ast.parse(source)))) == 1
    told = source.replace("def f():", "def f(): self.pp.observer.before(r);")
    assert list(talking(ast.parse(told))) == []


def test_an_axis_has_exactly_one_tap() -> None:
    assert {f.name for f in fields(Axis)} == {"name", "rank", "size", "ranks", "group", "observer"}
    taps = [name for name in dir(ParallelContext) if "observ" in name or "watch" in name]
    assert taps == ["observed"]
    public = {name for name in vars(Observer) if not name.startswith("_")}
    assert public == {"follows", "before", "started", "waiting"}
