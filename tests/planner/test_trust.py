"""Where trust ends a plan says so, and measured steps of that kind lie in the range it gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.planner.forecast import Forecast, forecast
from megatron_lite.planner.trust import trusted
from megatron_lite.planner.work import StageTimes
from tests.planner import published

TOOL = Path(__file__).resolve().parents[2] / "tools" / "plan.py"

SMALL = (
    "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 --vocab-size 50304 "
    "--micro-batch-size 4 --global-batch-size 512 --bf16 --hidden-dropout 0 --attention-dropout 0"
)
LARGE = (
    "--num-layers 80 --hidden-size 8192 --num-attention-heads 64 --seq-length 4096 --vocab-size 50304 "
    "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --micro-batch-size 1 "
    "--global-batch-size 1024 --bf16 --sequence-parallel --use-distributed-optimizer "
    "--hidden-dropout 0 --attention-dropout 0"
)


def planned(hardware: str, gpus: int, flags: str, per_node: int = 8) -> Forecast:
    """A plan of so many devices."""
    machines = f"--hardware {hardware} --world-size {gpus} --gpus-per-node {per_node} "
    blueprint, asked, cluster = published.drawn(machines + flags)
    return forecast(blueprint, asked, cluster)


def doubts(plan: Forecast) -> str:
    """All of them, or nothing."""
    found = trusted(plan)
    return "" if found is None else "; ".join(found.why)


@pytest.mark.parametrize(("hardware", "gpus", "flags", "words"), [
    ("h100", 256, LARGE, ""),
    ("a100-80g", 256, LARGE, ""),
    ("gb200", 256, LARGE, ""),
    ("b200", 256, LARGE, "no measured step on b200"),
    ("mi300x", 256, LARGE, "no measured step on mi300x"),
    ("h100", 8192, LARGE, "more than 4,096 devices"),
    ("h100", 64, SMALL, "below 10B"),
    ("h100", 1, SMALL.replace("512", "64"), ""),
    ("a100-80g", 8, SMALL.replace("2048 --num", "768 --num").replace("heads 16", "heads 12"), "below 1B"),
    ("h100", 256, LARGE.replace("4096", "131072"), "attention is most"),
    ("h100", 256, LARGE + " --attention-backend unfused", "not fused"),
    ("h100", 256, LARGE.replace("--bf16", ""), "fp32"),
    ("h100", 1, SMALL.replace("512", "4") + " --optimizer muon", "whole matrices"),
    ("h100", 1024, LARGE + " --context-parallel-size 4", "cp 2"),
    ("h100", 1, SMALL.replace("512", "64") + " --lora-rank 8", "frozen"),
    ("h100", 1, SMALL.replace("512", "64") + " --optimizer-cpu-offload", "host memory"),
    ("h100", 1, SMALL.replace("512", "64000") + " --optimizer-cpu-offload", ""),
    ("cpu", 2, SMALL.replace("512", "64"), "a guess"),
    ("h100", 1, SMALL.replace("512", "1").replace("size 4", "size 1").replace("2048 --vocab", "128 --vocab"),
     "waits for its host"),
], ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "")  # fmt: skip
def test_each_doubt_is_told_where_it_holds_and_nowhere_else(
    hardware: str, gpus: int, flags: str, words: str
) -> None:
    found = doubts(planned(hardware, gpus, flags))
    assert found == "" if not words else words in found


def test_tp_over_nodes_is_in_doubt() -> None:
    assert "tp leaves the node" in doubts(planned("h100", 256, LARGE, per_node=4))


def test_measured_stage_times_are_not_in_doubt() -> None:
    plan = planned("b200", 256, LARGE)
    assert trusted(plan) is not None
    given = forecast(plan.blueprint, plan.asked, plan.cluster, given=StageTimes(1.0, 1.0, 1.0, 0.1))
    assert trusted(given) is None


def test_the_tool_says_the_range_and_why_in_both_forms() -> None:
    line = [sys.executable, str(TOOL), "--hardware", "h100", "--nodes", "8", *SMALL.split()]
    text = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    read = json.loads(
        subprocess.run([*line, "--json"], capture_output=True, text=True, check=True).stdout
    )
    low, high = read["time"]["range_seconds"]
    assert low < read["time"]["step_seconds"] < high
    assert f"{low:.3f} to {high:.3f}" in text
    assert all(f"a range, not a number: {why}" in text for why in read["time"]["in_doubt"])


@pytest.mark.ci
def test_a_search_says_the_range_of_its_first_layout() -> None:
    line = [
        sys.executable,
        str(TOOL),
        "--hardware",
        "b200",
        "--nodes",
        "1",
        "--search",
        "--top",
        "2",
    ]
    flags = SMALL.replace("--micro-batch-size 4 ", "").split()
    text = subprocess.run([*line, *flags], capture_output=True, text=True, check=True).stdout
    found = json.loads(
        subprocess.run([*line, *flags, "--json"], capture_output=True, text=True, check=True).stdout
    )
    low, high = found["layouts"][0]["range_seconds"]
    assert f"the first takes {low:.3f} to {high:.3f} s" in text
    assert "no measured step on b200" in text
