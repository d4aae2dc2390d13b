"""The demo is the same whatever a user has exported for runs of their own."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples/demo/run.sh"
TRAIN = ROOT / "examples/gpt3/train_gpt3_175b_distributed.sh"
# How programs are run, not what: these may come from outside.
PASSED_ON = {"PYTHON", "VIRTUAL_ENV", "SLURM_NODEID", "OMP_NUM_THREADS", "PYTHONPATH"}
PASSED_ON |= {"CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}


def commands(tmp_path: Path, exported: dict[str, str]) -> list[str]:
    """Every python command of the demo; a stand-in for python prints its arguments."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "python $*"\n')
    python.chmod(0o755)
    env = {"PATH": os.environ["PATH"], **exported}
    env |= {"PYTHON": str(python), "DEMO": str(tmp_path / "demo")}
    done = subprocess.run(
        ["bash", str(DEMO)], env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("python ")]


def test_what_a_user_exported_for_other_runs_does_not_change_the_demo(tmp_path: Path) -> None:
    """The quickstart exports DATASET; it would otherwise take the place of the demo's corpora."""
    script = TRAIN.read_text(encoding="utf-8")
    variables = set(re.findall(r"\$\{([A-Z][A-Z0-9_]*):?-", script)) - PASSED_ON
    assert {"DATASET", "LOAD_PATH", "DRY_RUN", "WEIGHT_DECAY", "MASTER_ADDR"} <= variables
    plain = commands(tmp_path, {})
    assert sum("tools/launch.py" in line for line in plain) == 2
    assert commands(tmp_path, dict.fromkeys(variables, "1")) == plain
