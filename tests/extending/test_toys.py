"""One row of every table from outside the package, by --extend: trained, saved, resumed and planned.

The files beside this one are all that CONTRIBUTING, "How to add", says a row needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.support.launch import TINY, launch
from tests.support.places import ROOT
from tests.support.sizes import with_flags
from tests.train.runs import curve, steps

HERE = Path(__file__).parent
NAMES = ("optimizer", "engine", "kernel", "dataset", "objective")
TOYS = [
    "--extend", *(str(HERE / f"{name}.py") for name in NAMES),
    "--optimizer", "signum", "--engine", "apart", "--objective", "previous-token",
]  # fmt: skip
PHI3 = [
    "--swiglu", "--normalization", "RMSNorm", "--position-embedding-type", "rope",
    "--disable-bias-linear", "--untie-embeddings-and-output-weights",
    "--hidden-dropout", "0", "--attention-dropout", "0",
]  # fmt: skip
"""The model of the family beside this file."""
LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
ARGV = [*with_flags(TINY, "--train-iters", "4"), *PHI3, *LAYOUT, *TOYS]


def run(save: Path, *words: str) -> str:
    """Four steps of the toys on four ranks; what rank 0 says."""
    ended = launch(4, [*ARGV, "--save", str(save), "--save-interval", "2", *words])
    assert [rank.rc for rank in ended] == [0] * 4, [rank.err[-600:] for rank in ended]
    return ended[0].out


def tool(name: str, *words: str) -> str:
    """What a tool of ours says, in a process of its own."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.ci
def test_toys_train_save_and_resume(tmp_path: Path) -> None:
    """A resumed run goes on as the one that was never interrupted, to the last bit."""
    assert "swiglu: written-out" in run(tmp_path / "whole")
    whole = steps(tmp_path / "whole")
    assert [step.iteration for step in whole] == [1, 2, 3, 4] and whole[3].loss < whole[0].loss
    assert all(step.metrics["surprise"] > 0 for step in whole)
    run(tmp_path / "resumed", "--load", str(tmp_path / "whole"), "--ckpt-step", "2")
    assert curve(steps(tmp_path / "resumed")) == curve(whole[2:])
    exported = tmp_path / "exported"
    files = [str(HERE / f"{name}.py") for name in ("family", "dataset", "objective")]
    extended = [word for file in files for word in ("--extend", file)]
    words = ["--no-tokenizer", "--family", "phi3"]
    tool("convert", str(tmp_path / "whole"), str(exported), *words, *extended)
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert file.get_slice("model.layers.1.self_attn.qkv_proj.weight").get_shape() == [96, 32]


@pytest.mark.ci
def test_toys_are_planned() -> None:
    """Lion keeps one state of each parameter; what the planner does not know of an engine it says."""
    plan = json.loads(tool("plan", *ARGV, "--hardware", "cpu", "--gpus-per-node", "4", "--json"))
    for stage in plan["stages"]:
        assert stage["memory_bytes"]["moments"] == stage["memory_bytes"]["weights"] > 0
    assert any("--engine apart: planned as zero" in note for note in plan["notes"])
