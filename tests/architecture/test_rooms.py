"""A room inside a folder knows its house by a noun at most; a session is opened where it is described."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from tests.architecture.source import modules_needed
from tests.support.places import PACKAGE

NOUNS = {
    "train/health": {"train.run"},  # Run: what every question of these rooms is about
    "train/ending": {"train.run"},
    "blueprint/schedules": {"blueprint.stages"},  # where a stage sits
}
"""Room -> the only files of its house that it imports although the house imports it."""


def entangled(root: Path, needs: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Room -> files of its house that it imports, of each room that its house's own files import."""
    rooms = {path.parent for path in root.glob("*/*/__init__.py")}

    def lies_in(module: str) -> Path:
        path = root.parent.joinpath(*module.split("."))
        return path if path.is_dir() else path.parent

    into: dict[Path, set[str]] = defaultdict(set)
    used: set[Path] = set()
    for module, needed in needs.items():
        here = lies_in(module)
        for other in needed:
            there = lies_in(other)
            if here in rooms and there == here.parent:
                into[here].add(other.partition(".")[2])
            elif there in rooms and here == there.parent:
                used.add(there)
    return {room.relative_to(root).as_posix(): into[room] for room in used if into[room]}


def test_a_room_knows_the_house_that_uses_it_by_its_noun_alone() -> None:
    assert entangled(PACKAGE, modules_needed(PACKAGE)) == NOUNS


def test_an_entangled_room_is_found(tmp_path: Path) -> None:
    for file in ("a/__init__.py", "a/x/__init__.py", "a/y/__init__.py", "a/one.py", "a/x/two.py"):
        (tmp_path / "p" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / file).touch()
    needs = {"p.a.x.two": {"p.a.one"}, "p.a.y": {"p.a.one"}}
    assert entangled(tmp_path / "p", needs) == {}
    assert entangled(tmp_path / "p", needs | {"p.a.one": {"p.a.x"}}) == {"a/x": {"a.one"}}


def test_a_session_is_opened_where_it_is_described_in_a_handful_of_named_steps() -> None:
    tree = ast.parse((PACKAGE / "train" / "session.py").read_text(encoding="utf-8"))
    (opening,) = (
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "open_session"
    )
    assert "Session" in {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
    called = [ast.unparse(n.func) for n in ast.walk(opening) if isinstance(n, ast.Call)]
    steps = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)} & set(called)
    assert 5 <= len(steps) <= 8 and set(called) - steps == {"draw_up"}
