"""What the user may not read or write is named at the start, with the way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.pairs import NULL, pair
from tests.support.launch import LAUNCHER_NAMES, TINY, TOOL, WITHOUT_DATA
from tests.support.places import ROOT
from tests.support.rights import needs_right
from tests.support.sizes import with_flags

pytestmark = pytest.mark.root  # from whom its powers must be taken first

POWERS = "-dac_override,-dac_read_search"
"""What lets root pass every permission."""


def run(folder: Path, tool: Path, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The tool as a user whom permissions stop: root without root's powers over files."""
    command = [sys.executable, str(tool), *words]
    if os.geteuid() == 0:
        drop = ["setpriv", "--bounding-set", POWERS, "--inh-caps", POWERS]
        needs_right(drop, "to take root's powers away")
        command = [*drop, *command]
    clean = {name: v for name, v in os.environ.items() if name not in LAUNCHER_NAMES}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=90,
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def require(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr[-2000:]
    assert done.stderr.count("FATAL[") == 1 and "Traceback" not in done.stderr
    fatal = done.stderr[done.stderr.find("FATAL[") :]
    assert fatal.startswith(f"FATAL[{code}] ")
    for word in words:
        assert word in fatal, fatal
    assert "iteration        1/" not in done.stdout


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_a_token_file_that_may_not_be_read(tmp_path: Path, kind: str) -> None:
    prefix = pair(tmp_path)
    (tmp_path / f"d.{kind}").chmod(0)
    words = with_flags(WITHOUT_DATA, "--data-path", str(prefix), "--split", "100,0,0")
    require(run(tmp_path, TOOL, words), 3, f"{prefix}.{kind}", "ermission")


def test_an_input_that_may_not_be_read(tmp_path: Path) -> None:
    text = tmp_path / "in.json"
    text.write_text(json.dumps({"text": "1 2"}) + "\n")
    text.chmod(0)
    words = ["--input", str(text), "--output-prefix", str(tmp_path / "out"), *NULL]
    require(run(tmp_path, ROOT / "tools" / "preprocess_data.py", words), 3, str(text), "ermission")
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


@pytest.mark.parametrize("inside", ["", "run"], ids=["the folder", "a folder in it"])
def test_a_save_path_that_may_not_be_written(tmp_path: Path, inside: str) -> None:
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    fixed.chmod(0o555)
    save = fixed / inside
    done = run(tmp_path, TOOL, [*TINY, "--save", str(save), "--save-interval", "2"])
    require(done, 5, str(save), "ermission", "choose a folder you may write to")
    assert not list(fixed.iterdir())


def test_an_output_folder_that_may_not_be_written(tmp_path: Path) -> None:
    text, fixed = tmp_path / "in.json", tmp_path / "fixed"
    text.write_text(json.dumps({"text": "1 2"}) + "\n")
    fixed.mkdir()
    fixed.chmod(0o555)
    words = ["--input", str(text), "--output-prefix", str(fixed / "out"), *NULL]
    done = run(tmp_path, ROOT / "tools" / "preprocess_data.py", words)
    require(done, 5, str(fixed), "ermission", "choose a folder you may write to")
    assert not list(fixed.iterdir())


@pytest.mark.parametrize("flag", ["--save", "--load"])
def test_a_folder_that_may_not_be_entered(tmp_path: Path, flag: str) -> None:
    """What lies in it cannot even be asked for: no traceback, and no fresh start."""
    closed = tmp_path / "closed"
    (closed / "run").mkdir(parents=True)
    closed.chmod(0)
    try:
        done = run(tmp_path, TOOL, [*TINY, flag, str(closed / "run"), "--save-interval", "2"])
    finally:
        closed.chmod(0o755)
    require(done, 5, str(closed / "run"), "ermission")
