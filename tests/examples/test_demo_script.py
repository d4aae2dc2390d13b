"""The demo is the same whatever a user has exported for runs of their own."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.telemetry.record import EvaluationRecord, record_json
from tests.support.places import ROOT

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


def test_three_prompts_end_where_a_token_ends() -> None:
    """A space at the end is a token of its own that no text continues: what follows is noise."""
    text = DEMO.read_text(encoding="utf-8").replace("\\\n", " ")
    words = shlex.split(next(line for line in text.splitlines() if "generate.py" in line))
    prompts = words[words.index("--prompt") + 1 : words.index("--max-new-tokens")]
    assert len(prompts) == 3
    assert all(prompt and prompt == prompt.rstrip() for prompt in prompts)


@pytest.mark.parametrize(("loss", "code"), [(4.2, 0), (4.4, 1)])
def test_the_verdict_is_whether_the_bigram_is_beaten(
    loss: float, code: int, tmp_path: Path
) -> None:
    record = EvaluationRecord(iteration=9, split="test", samples=9, loss=loss, seconds=1.0)
    (tmp_path / "metrics.jsonl").write_text(record_json(record) + "\n", encoding="utf-8")
    models = {"unigram": 6.4, "bigram": 4.3, "trigram": 3.4}
    scores = {
        name: {"loss": loss, "perplexity": 2.718281828**loss} for name, loss in models.items()
    }
    (tmp_path / "ngrams.json").write_text(json.dumps({"models": scores}), encoding="utf-8")
    asked = [sys.executable, str(DEMO.with_name("verdict.py")), str(tmp_path)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    said = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert float(said["bigram"][2]) == pytest.approx(73.70, abs=0.01)
    assert float(said["model"][1]) == loss
    assert all(len(said[name]) > 6 for name in (*models, "model"))  # a line of meaning each
