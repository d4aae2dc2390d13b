"""MacroGPT's run by its ds.json: the commands of its README as they are printed, with both engines."""

from __future__ import annotations

import re

import pytest

from tests.examples.systems import block, carried_out
from tests.support.extras import needs, needs_program
from tests.support.places import ROOT

OURS, THEIRS, PLANNED = (line for line in block("macrogpt") if "pretrain_deepspeed" in line)


def losses(said: str) -> list[float]:
    """Of the lines that were logged."""
    return [float(n) for n in re.findall(r"lm loss: (\S+) ", said)]


def told() -> list[float]:
    """As the README says, in both languages."""
    found = [
        re.findall(r"6\.\d{4}", (ROOT / "examples/macrogpt" / name).read_text("utf-8"))
        for name in ("README.md", "README.zh-CN.md")
    ]
    assert found[0] == found[1] and len(found[0]) == 4
    return [float(n) for n in found[0]]


@pytest.mark.ci
def test_two_ranks_of_ours_print_the_losses_of_the_readme() -> None:
    done = carried_out(OURS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(done.stdout) == pytest.approx(told(), abs=1e-3)


@pytest.mark.oracles
def test_deepspeed_s_launcher_and_engine_print_them_too() -> None:
    needs("deepspeed")
    launcher = needs_program("deepspeed", "deepspeed")
    done = carried_out(THEIRS.replace("LAUNCHER=deepspeed", f"LAUNCHER={launcher}"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(done.stdout) == pytest.approx(told(), abs=1e-3)


def test_its_own_sizes_are_planned() -> None:
    done = carried_out(PLANNED)
    assert done.returncode == 0, done.stderr
    assert "1.473 B parameters on 2 x a100-80g" in done.stdout and "ZeRO stage 2" in done.stdout


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"FULL": "1"}, "DATA=PREFIX of a token file"),
        ({"DATA": "tokens/a"}, "TOKENIZER=tokenizer.model, which made it"),
    ],
)
def test_what_is_not_said_ends_the_run_at_once(env: dict[str, str], said: str) -> None:
    done = carried_out(OURS, **env)
    assert done.returncode == 2 and said in done.stderr
