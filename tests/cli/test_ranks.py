"""What the ranks of a tool find before they have met, they say in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.places import ROOT


@pytest.mark.ci
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tensor-model-parallel-size", "2"], "are 2 ranks, 3 were started"),
        pytest.param(
            ["--max-new-tokens", "0"],
            "--max-new-tokens 0 must be at least 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_that_find_the_same_say_it_once(words: list[str], said: str) -> None:
    launched = [sys.executable, str(ROOT / "tools" / "launch.py"), "--nproc_per_node", "3"]
    command = [
        *launched,
        str(ROOT / "tools" / "generate.py"),
        "--load",
        "none",
        "--use-cpu",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("FATAL")]
    assert line.startswith("FATAL[2] ") and said in line
