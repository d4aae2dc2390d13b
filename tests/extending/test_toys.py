"""One row of every table from outside the package, by --extend: trained, saved, resumed and planned.

The files beside this one are all that CONTRIBUTING, "How to add", says a row needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import TINY, launch
from tests.support.sizes import with_flags
from tests.train.runs import curve, steps

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = ("optimizer", "engine", "kernel", "dataset", "objective")
FILES = [str(HERE / f"{name}.py") for name in NAMES]
TOYS = ["--extend", *FILES, *"--optimizer lion --engine apart --objective previous-token".split()]
LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]


def run(save: Path, *words: str):
    """Four steps of the toys on four ranks; rank 0."""
    argv = [*with_flags(TINY, "--train-iters", "4"), *LAYOUT, *TOYS, "--save", str(save)]
    ended = launch(4, [*argv, "--save-interval", "2", *words])
    assert [rank.rc for rank in ended] == [0] * 4, [rank.err[-600:] for rank in ended]
    return ended[0]


@pytest.mark.ci
def test_toys_train_save_and_resume(tmp_path: Path) -> None:
    """A resumed run goes on as the one that was never interrupted, to the last bit."""
    run(tmp_path / "whole")
    whole = steps(tmp_path / "whole")
    assert [step.iteration for step in whole] == [1, 2, 3, 4] and whole[3].loss < whole[0].loss
    assert all(step.metrics["surprise"] > 0 for step in whole)
    run(tmp_path / "resumed", "--load", str(tmp_path / "whole"), "--ckpt-step", "2")
    assert curve(steps(tmp_path / "resumed")) == curve(whole[2:])


@pytest.mark.ci
def test_toys_are_planned() -> None:
    """Lion keeps one state of each parameter; what the planner does not know of an engine it says."""
    argv = [*TINY, *LAYOUT, *TOYS, "--hardware", "cpu", "--gpus-per-node", "4", "--json"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/plan.py"), *argv],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    for stage in plan["stages"]:
        assert stage["memory_bytes"]["moments"] == stage["memory_bytes"]["weights"] > 0
    assert any("--engine apart: planned as zero" in note for note in plan["notes"])
