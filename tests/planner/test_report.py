"""What people and programs read of a plan: nothing vanishes, runs together or goes unsaid."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
import unittest.mock
from typing import Any

import pytest

from megatron_lite.cli import plan as plan_tool
from megatron_lite.config.errors import ConfigError
from megatron_lite.planner.columns import aligned

MODEL = (
    "--hardware h100 --nodes 1 --num-layers 8 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 "
    "--vocab-size 50257 --micro-batch-size 1 --global-batch-size 32 --bf16 "
)
MUON = "--num-layers 1 --hidden-size 4096 --seq-length 128 --optimizer muon --use-distributed-optimizer"
"""Its worst moment is a matrix's update, when activations are gone."""


def said(flags: str) -> str:
    with (
        unittest.mock.patch.object(sys, "argv", ["plan.py", *shlex.split(MODEL + flags)]),
        contextlib.redirect_stdout(io.StringIO()) as out,
    ):
        assert plan_tool.main() == 0
    return out.getvalue()


def planned(flags: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said(f"--json {flags}"))
    return found


def test_activations_and_logits_have_a_column_where_the_worst_moment_has_none() -> None:
    text, stage = said(MUON), planned(MUON)["stages"][0]
    head, row = text.splitlines()[4:6]
    assert stage["worst_moment"] == "updating" and stage["memory_bytes"]["logits"] == 0.0
    gib = {kind: size / 2**30 for kind, size in stage["computing_bytes"].items()}
    assert gib["logits"] > 0.01
    columns = dict(zip(re.split("  +", head), re.split("  +", row), strict=False))
    assert columns["activ."] == f"({gib['activations']:.2f})"
    assert columns["logits"] == f"({gib['logits']:.2f})"
    assert "pp 0: most is needed when matrices are updated whole" in text
    usual = said("--pipeline-model-parallel-size 2").splitlines()
    assert "activ.  logits" in usual[4] and re.search(r" 0\.00  ", usual[5])
    assert not any("(" in line for line in usual[5:7])


def test_numbers_of_any_size_stand_apart() -> None:
    rows = [["a", "b"], ["1", "2" * 30, "and more"], ["3" * 12, "4"]]
    lines = list(aligned(rows, least=1))
    assert [line.split() for line in lines] == [
        ["a", "b"],
        ["1", "2" * 30, "and", "more"],
        ["3" * 12, "4"],
    ]
    assert len({len(line) for line in lines if "more" not in line}) == 1
    text = said(
        "--tokens 60T --micro-batch-size 64 --global-batch-size 100007936 --seq-length 65536"
    )
    (last,) = re.findall(r"^ +\d.*0\.0000e\+00$", text, re.M)
    assert len(last.split()) == 4 and "100,007,936" in last.split()


def test_advice_and_drawing_say_device_batch_length_schedule_and_precision() -> None:
    head = said("--tokens 1B").splitlines()[:3]
    assert "8 x h100 (1 node)" in head[0] and head[0].endswith("1f1b")
    assert "32 sequences of 1,024" in head[1] and "bf16" in head[2]
    assert said("--tokens 1B --lr 1e-3 --advise").splitlines()[:3] == head
    plan, advice = planned("--tokens 1B --lr 1e-3"), planned("--tokens 1B --lr 1e-3 --advise")
    for key in ("hardware", "precision", "layout"):
        assert plan[key] == advice[key]
    assert plan["model"].items() < advice["model"].items()
    drawn = said("--draw - --pipeline-model-parallel-size 4")
    assert drawn.startswith(
        "1f1b, pp 4, 8 of 16 micro batches of 1 x 1,024, 8 x h100 (1 node), bf16: "
    )


def test_advice_takes_measured_times_where_they_matter() -> None:
    advise = "--tokens 1B --lr 1e-3 --advise"
    for flag in ("--measured-seconds 3", "--stage-times-ms 9 9 9 0"):
        with pytest.raises(ConfigError, match=f"{flag.split()[0]} changes nothing of --advise's"):
            said(f"{advise} {flag}")
    with pytest.raises(ConfigError, match="--price-per-gpu-hour changes nothing of --advise's"):
        said(f"{advise} --price-per-gpu-hour 2 --exit-duration-in-mins 60")
    stops = said(f"{advise} --measured-seconds 3 --exit-duration-in-mins 60")
    assert "at about step 1,200 of 30,518" in stops


def test_sequence_parallelism_at_tp_1_is_the_same_plan() -> None:
    """The trainer has nothing to split there."""
    for layout in ("", "--pipeline-model-parallel-size 4 --pipeline-schedule zb-h1"):
        split, whole = planned(f"{layout} --sequence-parallel"), planned(layout)
        assert split.pop("notes") != whole.pop("notes")
        assert split == whole
        at_two = f"{layout} --tensor-model-parallel-size 2"
        assert planned(f"{at_two} --sequence-parallel")["time"] != planned(at_two)["time"]
