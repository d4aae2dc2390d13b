"""tools/<name>.py only start megatron_lite/cli/<name>.py, and hide no package while they do."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import PACKAGE, ROOT

TOOLS = ROOT / "tools"
NAMES = sorted({path.stem for path in (PACKAGE / "cli").glob("*.py")} - {"__init__"})
STARTER = """#!/usr/bin/env python3
\"\"\"Starts megatron_lite/cli/{name}.py.\"\"\"

import os
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.realpath(__file__))
    # without this folder: a file here would hide the package of its name
    sys.path[:] = [os.path.dirname(here), *(p for p in sys.path if os.path.realpath(p) != here)]
    from megatron_lite.cli.{name} import start

    start()
"""


def test_every_main_has_its_starter_and_a_starter_is_nothing_else() -> None:
    assert sorted(path.stem for path in TOOLS.glob("*.py")) == NAMES
    for name in NAMES:
        path = TOOLS / f"{name}.py"
        assert path.read_text(encoding="utf-8") == STARTER.format(name=name)


@pytest.mark.parametrize("name", NAMES)
def test_a_main_starts_without_the_folder_of_its_script(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(TOOLS), "/elsewhere", *sys.path])  # as of a script
    paths: list[list[str]] = []
    main = importlib.import_module(f"megatron_lite.cli.{name}")
    monkeypatch.setattr(main, "start", lambda: paths.append(list(sys.path)))
    runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
    runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__mp_main__")  # as a worker of its own
    (path,) = paths
    assert path[0] == str(ROOT) and "/elsewhere" in path
    assert str(TOOLS) not in map(os.path.realpath, path)


@pytest.mark.parametrize("option", ["-B", "-P"])
def test_a_tool_hides_no_package_of_its_own_name(tmp_path: Path, option: str) -> None:
    """A tool `evaluate` asks for the installed `evaluate`, and so does what it imports."""
    if option == "-P" and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no safe path")
    for file, text in {
        "tools/evaluate.py": STARTER.format(name="evaluate"),
        "tools/json.py": "raise SystemExit('the folder of the script is on the path')",
        "megatron_lite/cli/evaluate.py": "import evaluate, json\n"
                                         "def start(): print(evaluate.whose)",
        "installed/evaluate/__init__.py": "whose = 'the package'",
    }.items():  # fmt: skip
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-S", option, str(tmp_path / "tools" / "evaluate.py")],
        capture_output=True, text=True, timeout=60, cwd=tmp_path / "tools",
        env={"PYTHONPATH": str(tmp_path / "installed")},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("the package\n", "")


def test_a_main_is_a_module_that_can_be_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lite.cli.demo_corpus", "--nothing"],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2 and "OUTDIR" in done.stderr.upper()
