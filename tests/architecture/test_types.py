"""mypy is strict where torch is not: what --strict refuses is refused in each of those folders."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.architecture.floors import NEVER
from tests.support.extras import needs
from tests.support.places import ROOT

needs("mypy")

STRICT = {
    folder for folder, libraries in NEVER.items() if libraries & {"torch", "torch.distributed"}
}
TORCH_FREE = sorted(STRICT - {"kernels"})

PROBE = '''"""One line for each thing that --strict adds."""
import json
import json as reexported  # noqa
from typing import Any

def untyped(a, b):
    return a + b

def half(a: int, b):
    return a

def bare(a: list) -> int:
    return len(a)

def passed_on(a: Any) -> int:
    return a.size

def calls() -> None:
    untyped(1, 2)

def compares(a: int) -> bool:
    return a == "one"

class Child(json.nothing.Parent):  # type: ignore[attr-defined]
    pass

@untyped
def decorated() -> int:
    return 1

number: int = 1  # type: ignore[assignment]
'''
CODES = {
    "no-untyped-def", "type-arg", "no-any-return", "no-untyped-call", "comparison-overlap",
    "misc", "unused-ignore",
}  # fmt: skip


def complaints(root: Path, folders: list[str]) -> dict[str, set[str]]:
    """folder -> mypy's codes for the probe in it, under this project's settings."""
    for folder in folders:
        place = root / "megatron_lite" / folder
        place.mkdir(parents=True)
        for package in (place, place.parent):
            (package / "__init__.py").touch()
        (place / "probe.py").write_text(PROBE)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"),
               "--cache-dir", str(root / "cache"), "megatron_lite"]  # fmt: skip
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    found: dict[str, set[str]] = {folder: set() for folder in folders}
    for folder, code in re.findall(r"megatron_lite/(\w+)/probe\.py:.*\[([a-z-]+)\]$", done.stdout,
                                   re.MULTILINE):  # fmt: skip
        found[folder].add(code)
    return found


def test_the_torch_free_folders_are_strict(tmp_path: Path) -> None:
    assert TORCH_FREE == ["blueprint", "config", "data", "planner", "storage", "telemetry"]
    found = complaints(tmp_path, [*TORCH_FREE, "layers"])
    assert {folder: CODES - found[folder] for folder in TORCH_FREE} == dict.fromkeys(
        TORCH_FREE, set()
    )
    assert "no-untyped-def" in found["layers"], "annotations are asked for everywhere"
