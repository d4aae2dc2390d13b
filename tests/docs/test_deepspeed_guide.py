"""The guide on DeepSpeed's configurations: its commands are run as they are printed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.docs.walking import blocks, in_shell, read
from tests.support.extras import needs, needs_program

ENGINE = "--engine deepspeed"
"""In the commands that need the library."""


@pytest.mark.ci
def test_every_command_of_the_guide_runs(tmp_path: Path) -> None:
    found = blocks(read("deepspeed"))
    codes = [code for language, code in found if language == "bash" and ENGINE not in code]
    (notes,) = (code.splitlines() for language, code in found if language == "text")
    assert len(codes) == 4
    _, plan, run, forecast = in_shell(codes, tmp_path)
    assert [line for line in plan if line.startswith("NOTE")] == notes
    assert plan[-1] == "dry run: every rule holds; nothing was started"
    rates = [re.search(r"learning rate: (\S+) ", line) for line in run]
    assert [float(one[1]) for one in rates if one] == pytest.approx([1.5e-4, 2e-4, 0.0], abs=1e-12)
    assert any("global batch size:    16" in line for line in run)
    assert any("tp 1 x cp 1 x dp 2 x pp 1" in line for line in forecast)


def test_the_chinese_guide_prints_the_same() -> None:
    assert blocks(read("deepspeed")) == blocks(read("deepspeed.zh-CN"))


@pytest.mark.oracles
def test_deepspeed_s_own_engine_and_then_ours_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("deepspeed")
    folder = os.path.dirname(needs_program("deepspeed", "deepspeed"))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    codes = [code for language, code in blocks(read("deepspeed")) if language == "bash"]
    written, named, *rest = codes
    assert "--dry-run" in named and named.count("\n") == 3
    shared = "".join(named.splitlines(keepends=True)[:2])
    (run,) = (code for code in rest if ENGINE in code)
    _, _, said = in_shell([written, shared, run], tmp_path)
    found = [re.search(r"iteration +(\d+)/.*lm loss: (\S+) ", line) for line in said]
    steps = [int(one[1]) for one in found if one]
    assert steps == sorted(steps) and {4, 8} <= set(steps)
    assert any("successfully loaded checkpoint" in line for line in said)
