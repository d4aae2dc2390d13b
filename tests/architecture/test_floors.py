"""The floors as a test: an import that climbs, or is forbidden, fails with its line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.floors import MAY_IMPORT, NEVER
from tests.architecture.source import imports
from tests.support.places import PACKAGE, ROOT

OPTIONAL_EXTRAS = {"telemetry/writers.py": {"torch.utils.tensorboard"}}
"""file -> what it may import inside a function although its folder may not."""


def violations(root: Path) -> Iterator[str]:
    """One line per import that is not allowed under a package root."""
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).as_posix()
        folder = inside.split("/")[0]
        where = f"{root.name}/{inside}"
        if folder.endswith(".py"):
            yield from (f"{where}:{line}: imports {m}" for line, m in imports(path, root))
            continue
        if folder not in MAY_IMPORT:
            yield f"{where}: folder {folder!r} has no floor; add it to MAY_IMPORT"
            continue
        for line, module in imports(path, root):
            parts = module.split(".")
            if parts[0] in ("tests", "tools"):
                yield f"{where}:{line}: nobody may import {parts[0]}"
            if parts[0] == root.name and len(parts) > 1:
                target = parts[1]
                if target not in MAY_IMPORT[folder] | {folder}:
                    yield f"{where}:{line}: {folder}/ may not import {target}/"
            if any(module.startswith(extra) for extra in OPTIONAL_EXTRAS.get(inside, ())):
                continue
            for name in NEVER.get(folder, ()):
                if module == name or module.startswith(name + "."):
                    yield f"{where}:{line}: {folder}/ may not import {module}"


def test_every_import_points_down() -> None:
    assert list(violations(PACKAGE)) == []


def test_the_floor_table_has_no_cycle() -> None:
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        free = [f for f, needs in MAY_IMPORT.items() if f not in order and needs <= set(order)]
        assert free, f"these import each other: {set(MAY_IMPORT) - set(order)}"
        order += free


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("from megatron_lite.train.loop import fit", "blueprint/ may not import train/"),
        ("from megatron_lite import train", "blueprint/ may not import train/"),
        ("from ..train import loop", "blueprint/ may not import train/"),
        ("def late():\n    import torch.nn", "blueprint/ may not import torch.nn"),
        ("import tools.pretrain_gpt", "nobody may import tools"),
    ],
)
def test_a_climbing_import_is_found_with_its_line(
    tmp_path: Path, source: str, complaint: str
) -> None:
    file = tmp_path / "megatron_lite" / "blueprint" / "bad.py"
    file.parent.mkdir(parents=True)
    file.write_text("\n" + source + "\n")
    line = 2 + source.count("\n")
    assert list(violations(tmp_path / "megatron_lite")) == [
        f"megatron_lite/blueprint/bad.py:{line}: {complaint}"
    ]


def test_reading_token_files_needs_nothing_of_what_makes_them() -> None:
    data, preparing = PACKAGE / "data", f"{PACKAGE.name}.data.preparing"
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: imports {module}"
        for path in sorted(data.rglob("*.py"))
        if path.relative_to(data).parts[0] != "preparing"
        for line, module in imports(path, PACKAGE)
        if f"{module}.".startswith(f"{preparing}.")
    ]
    assert found == []


def test_only_those_who_assemble_see_the_whole_config() -> None:
    allowed = {"blueprint/draw_up.py"}
    seen = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for _, module in imports(path, PACKAGE)
        if module.startswith("megatron_lite.config.sections.run")
    }
    whole = {"config", "train", "rehearsal", "cli"}
    strangers = {file for file in seen if file.split("/")[0] not in whole}
    assert strangers <= allowed


def test_every_import_of_ours_exists() -> None:
    """Also in what no quick suite runs: a module that moved is missed by nobody."""
    missing = []
    for folder in ("megatron_lite", "tools", "tests", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, module in imports(path, PACKAGE):
                first, *others = module.split(".")
                if first not in ("megatron_lite", "tests", "benchmarks") or not others:
                    continue
                parts = [first, *others]
                places = (ROOT.joinpath(*parts[:n]) for n in (len(parts) - 1, len(parts)))
                if not any(p.is_dir() or p.with_suffix(".py").is_file() for p in places):
                    missing.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    assert missing == []
