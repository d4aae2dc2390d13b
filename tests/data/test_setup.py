"""The compiled helpers are optional: without a compiler the package builds and works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.extras import needs
from tests.support.places import ROOT


def test_a_missing_compiler_is_a_warning(tmp_path: Path) -> None:
    needs("setuptools")
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(
        ROOT / "megatron_lite", tmp_path / "megatron_lite", ignore=shutil.ignore_patterns("*.so")
    )
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "CC": "/bin/false", "CXX": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert "failed" in built.stderr or "no pybind11" in built.stderr
    program = (
        "from megatron_lite.data.indices import COMPILED, blend_index\n"
        "assert COMPILED is None\n"
        "print(*blend_index([0.35, 0.65], 8).dataset)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == list("10101101")
