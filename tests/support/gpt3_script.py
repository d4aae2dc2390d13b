"""The GPT-3 scripts as users call them: what they print, and the flags of what they would start."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.places import ROOT

TRAIN = ROOT / "examples/gpt3/train_gpt3_175b_distributed.sh"
TGS = ROOT / "examples/gpt3/train_gpt3_175b_distributed_tgs.sh"
PATHS = ("check points", "tensor board", "my vocab.json", "my merges.txt")

# The flag table of Megatron-LM's 175B script without ramp-up, at this project's tp 8 x pp 8.
FLAGS_175B = {
    "--num-layers": ["96"],
    "--hidden-size": ["12288"],
    "--num-attention-heads": ["96"],
    "--seq-length": ["2048"],
    "--max-position-embeddings": ["2048"],
    "--attention-backend": ["flash"],
    "--micro-batch-size": ["1"],
    "--global-batch-size": ["1536"],
    "--train-iters": ["500000"],
    "--weight-decay": ["0.1"],
    "--adam-beta1": ["0.9"],
    "--adam-beta2": ["0.95"],
    "--init-method-std": ["0.006"],
    "--clip-grad": ["1.0"],
    "--fp16": [],
    "--lr": ["6.0e-5"],
    "--lr-decay-style": ["cosine"],
    "--min-lr": ["6.0e-6"],
    "--lr-warmup-fraction": [".001"],
    "--lr-decay-iters": ["430000"],
    "--tensor-model-parallel-size": ["8"],
    "--pipeline-model-parallel-size": ["8"],
    "--sequence-parallel": [],
    "--data-path": ["0.35", "/data/wiki text", "0.65", "/data/owt"],
    "--data-cache-path": ["/fast/cache"],
    "--vocab-file": ["my vocab.json"],
    "--merge-file": ["my merges.txt"],
    "--split": ["949,50,1"],
    "--log-interval": ["100"],
    "--save-interval": ["10000"],
    "--eval-interval": ["1000"],
    "--eval-iters": ["10"],
    "--save": ["check points"],
    "--load": ["check points"],
    "--tensorboard-dir": ["tensor board"],
}
DATA = {"DATASET_1": "/data/wiki text", "DATASET_2": "/data/owt", "DATASETCACHE": "/fast/cache"}


def run(
    script: Path,
    *paths: str,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """The script in an environment that holds PATH and `env` only; a real start has a MASTER_ADDR."""
    if "PRINT_COMMAND" not in (env or {}):
        env = {"MASTER_ADDR": "localhost", **(env or {})}
    return subprocess.run(
        ["bash", str(script), *paths],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def command(
    script: Path, *paths: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> list[str]:
    """The words of the command the script would run."""
    done = run(script, *paths, env={"PRINT_COMMAND": "1", **(env or {})}, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def flags(words: list[str]) -> dict[str, list[str]]:
    """Trainer flag -> values; a flag given twice is an error of the script."""
    found: dict[str, list[str]] = {}
    name = None
    for word in words[words.index(str(ROOT / "tools/pretrain_gpt.py")) + 1 :]:
        if word.startswith("--"):
            assert word not in found, f"{word} is given twice"
            name = word
            found[name] = []
        else:
            assert name is not None, f"{word} before any flag"
            found[name].append(word)
    return found


def launch(words: list[str]) -> dict[str, str]:
    """Launcher flag -> value."""
    end = words.index(str(ROOT / "tools/pretrain_gpt.py"))
    assert words[:2] == [sys.executable, str(ROOT / "tools/launch.py")]
    rest = [word for word in words[2:end] if word != "--standalone"]
    return dict(zip(rest[::2], rest[1::2], strict=True))
