"""Two commits beside each other: what a row says, and that both sides really train."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_against import Answer, row, tree_of
from tests.support.places import ROOT

SCRIPT = ROOT / "benchmarks" / "bench_against.py"


def rounds(ours: list[float], base: list[float], again: list[float]) -> list[tuple[Answer, ...]]:
    return [
        tuple(Answer(w, w, 5.0) for w in walls) for walls in zip(ours, base, again, strict=True)
    ]


@pytest.mark.parametrize(
    ("ours", "again", "met"),
    [
        ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], True),
        ([1.03, 1.03, 1.03, 1.03], [1.0, 1.0, 1.0, 1.0], False),  # 0.971 is below 0.98
        ([1.01, 1.01, 1.01, 1.01], [1.0, 1.0, 1.0, 1.0], False),  # 0.990, but itself never strays
        ([1.01, 1.01, 1.01, 1.01], [1.02, 0.98, 1.02, 0.98], True),
    ],
)
def test_a_row_is_met_within_what_the_commit_is_from_itself(
    ours: list[float], again: list[float], met: bool
) -> None:
    line, found = row("fp32", rounds(ours, [1.0] * 4, again))  # type: ignore[arg-type]
    assert found is met and line.endswith("| met |" if met else "| MISSED |")
    assert f"| {1 / ours[0]:.3f} |" in line


def test_other_losses_show() -> None:
    line, _ = row("fp32", [(Answer(1, 1, 5.05), Answer(1, 1, 5.0), Answer(1, 1, 5.0))] * 2)
    assert "1.0e-02" in line


def test_a_commit_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="AGAINST=nowhere: no such commit"):
        tree_of("nowhere", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("train", "fp32"), ("parallel", "tp2")])
def test_this_commit_beside_itself_has_its_losses(kind: str, name: str) -> None:
    words = [kind, "HEAD", "--rounds", "2", "--steps", "1", "--only", name]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"| {name} ")]
    assert "| 0.0e+00 |" in line, "a working tree with other numbers than its commit"
