"""examples/chat_tiny: its talks, its commands as printed, and the whole of it in small."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT
from tests.support.preprocess import write_lines
from tests.support.talks import talk

FOLDER = ROOT / "examples" / "chat_tiny"


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In the repository, with nothing else in the environment."""
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, **env},
    )  # fmt: skip


def test_the_readmes_have_the_same_commands() -> None:
    found = [re.findall(r"^```bash\n(.*?)^```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)
             for path in sorted(FOLDER.glob("README*.md"))]  # fmt: skip
    assert len(found) == 2 and found[0] == found[1] and "run.sh" in found[0][0]


def test_the_talks_are_the_same_each_time_and_no_question_has_two_answers(tmp_path: Path) -> None:
    for name in ("a", "b"):
        done = run(sys.executable, str(FOLDER / "make_talks.py"), str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    lines = (tmp_path / "a").read_text().splitlines()
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() and len(lines) == 200
    answers: dict[str, set[str]] = {}
    for line in lines:
        first, second, *_ = json.loads(line)["messages"]
        answers.setdefault(first["content"], set()).add(second["content"])
    assert all(len(found) == 1 for found in answers.values())


@pytest.mark.parametrize("given", [{"STEPS": "0"}, {"EPOCHS": "x"}, {"TALKS": "/nowhere/x"}])
def test_what_cannot_be_run_is_refused_at_once(given: dict[str, str]) -> None:
    done = run(str(FOLDER / "run.sh"), **given)
    assert done.returncode == 2 and next(iter(given)) in done.stderr


@pytest.mark.slow
def test_in_small_it_learns_some_talks_by_heart(tmp_path: Path) -> None:
    """Of one's own: the same script, fewer steps, four talks."""
    mine = write_lines(
        tmp_path / "mine.jsonl", talk("Who is there?", "It is me."), talk("How many?", "Seven."),
        talk("Who is there?", "It is me.", "Really?", "Yes, me."), talk("Where?", "Here, of course."),
    )  # fmt: skip
    given = {"OUT": str(tmp_path / "out"), "TALKS": str(mine), "STEPS": "12", "EPOCHS": "320"}
    done = run(str(FOLDER / "run.sh"), **given)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "5 of 5 answers are the ones that were taught" in done.stdout
    short = run(str(FOLDER / "run.sh"), **given | {"EPOCHS": "1", "OUT": str(tmp_path / "short")})
    assert short.returncode == 1 and "fewer than 95%" in short.stderr
