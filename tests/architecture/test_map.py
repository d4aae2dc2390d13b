"""The map of the package is drawn three times and must be the same each time."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.architecture.floors import MAY_IMPORT
from tests.support.places import PACKAGE, ROOT

FIRST, LAST = "tools/  examples/", "storage/"


def picture(path: Path) -> list[str]:
    """The lines from the tools down to storage, without indentation; empty if none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    starts = [n for n, line in enumerate(lines) if line.strip().startswith(FIRST)]
    if not starts:
        return []
    ends = [n for n, line in enumerate(lines) if n > starts[0] and line.strip().startswith(LAST)]
    assert ends, f"{path}: the picture has no line for storage/"
    block = "\n".join(line.rstrip() for line in lines[starts[0] : ends[0] + 1])
    return textwrap.dedent(block).splitlines()


MAP = picture(PACKAGE / "__init__.py")


@pytest.mark.parametrize("name", ["README.md", "docs/ARCHITECTURE.md"])
def test_the_picture_is_the_same_as_in_the_package(name: str) -> None:
    path = ROOT / name
    assert picture(path) == MAP


def test_the_picture_names_every_folder_there_is() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(MAY_IMPORT)
    assert [folder for folder in sorted(folders) if f"{folder}/" not in "\n".join(MAP)] == []
