"""The two GPT-3 scripts, tiny, for real: two CPU ranks, a stop, another layout, a TGS summary."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_lite.telemetry.record import EvaluationRecord, StepRecord, read_metrics
from tests.support.gpt3 import GPT3, PATHS, make_folder, script_env


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """In a folder with a space in its name."""
    return make_folder(tmp_path / "a b")


def run(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(GPT3 / script), *PATHS],
        cwd=folder,
        env=script_env(**env),
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.ci
def test_a_stopped_run_continues_at_another_layout_by_the_same_line(folder: Path) -> None:
    script = "train_gpt3_175b_distributed.sh"
    first = run(script, folder, TP="1", PP="2", EXTRA_ARGS="--exit-interval 2")
    assert first.returncode == 0, first.stdout + first.stderr
    second = run(script, folder, TP="2", PP="1")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "at iteration 2" in second.stdout
    records = read_metrics(folder / "run/metrics.jsonl")
    assert [r.iteration for r in records if isinstance(r, StepRecord)] == [1, 2, 3, 4]
    finals = [r for r in records if isinstance(r, EvaluationRecord) and r.final]
    assert {r.split for r in finals} == {"validation", "test"}
    assert (folder / "run/latest_checkpointed_iteration.txt").read_text().strip() == "4"


def test_tgs_trains_ten_iterations_and_ends_with_the_summary(folder: Path) -> None:
    sizes = {"TP": "2", "PP": "1", "TRAIN_ITERS": "", "EVAL_ITERS": "", "LR_DECAY_ITERS": "10"}
    done = run("train_gpt3_175b_distributed_tgs.sh", folder, **sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_metrics(folder / "run/tgs/metrics.jsonl")
    assert [r.iteration for r in records if isinstance(r, StepRecord)] == list(range(1, 11))
    assert not [r for r in records if isinstance(r, EvaluationRecord)]
    assert not list((folder / "run/tgs").glob("iter_*"))
    summary = "\n".join(done.stdout.splitlines()[-2:])
    assert "(tgs)" in summary and "over 9 steps on 2 ranks" in summary
