"""What the GPT-3 scripts plan and rehearse, from any folder, before anything is started."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.gpt3_script import (
    PATHS,
    TGS,
    TRAIN,
    run,
)


@pytest.mark.parametrize("script", [TRAIN, TGS], ids=lambda path: path.stem)
def test_the_dry_run_plans_175b_on_64_ranks_from_anywhere_and_writes_nothing(
    script: Path, tmp_path: Path
) -> None:
    done = run(script, env={"DRY_RUN": "1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "174,615,846,912" in done.stdout  # vocabulary padded to 51,200
    assert "3.3862e+18" in done.stdout and "3.3406e+18" in done.stdout  # both FLOP conventions
    assert "1,536 micro batches" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_that_cannot_be_names_the_rules_and_exits_2(tmp_path: Path) -> None:
    env = {"DRY_RUN": "1", "NUM_ATTENTION_HEADS": "90", "NUM_LAYERS": "97"}
    done = run(TRAIN, *PATHS, env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert "--num-attention-heads" in done.stderr and "--num-layers" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_with_the_wrong_world_size_exits_2(tmp_path: Path) -> None:
    done = run(TRAIN, env={"DRY_RUN": "1", "NUM_NODES": "7"}, cwd=tmp_path)
    assert done.returncode == 2 and "56" in done.stderr


@pytest.mark.parametrize(
    "env",
    [
        {"PRECISION": "bf16", "TP": "4", "PP": "16"},
        {"PRECISION": "fp32", "TP": "1", "PP": "1", "NUM_NODES": "1", "GPUS_PER_NODE": "1"},
        {"EXTRA_ARGS": "--seed 7 --log-params-norm", "DATASET": "a"},
    ],
    ids=str,
)
def test_other_layouts_plan_too(env: dict[str, str], tmp_path: Path) -> None:
    done = run(TRAIN, *PATHS, env={"DRY_RUN": "1", **env}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.ci
def test_175b_on_64_ranks_is_rehearsed_in_little_memory_and_is_what_was_planned(
    tmp_path: Path,
) -> None:
    done = run(TRAIN, env={"REHEARSE": "1"}, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "rehearsing 16 of 64 ranks on 24 of 1,536 micro batches" in done.stdout
    assert "rehearsal: the ranks fit together; nothing was started" in done.stdout
    ratios = [float(r) for r in re.findall(r" rehearsed .* (\d\.\d{3})$", done.stdout, re.M)]
    assert len(ratios) >= 8 and all(0.9 < ratio < 1.1 for ratio in ratios)
    taken = re.search(r"at most (\d+\.\d+) GiB of memory per process", done.stdout)
    assert taken is not None and float(taken[1]) < 1.0
    assert list(tmp_path.iterdir()) == []
