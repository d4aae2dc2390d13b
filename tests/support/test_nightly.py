"""`make nightly`: parts one after the other, whatever becomes of them; the first failure's code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import nightly
from tests.nightly import LIMIT_MINUTES, PARTS, Part, Result, call, clock, run_all, summary
from tests.support.places import ROOT


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def test_the_parts_fit_into_the_night() -> None:
    assert sum(part.minutes for part in PARTS.values()) <= LIMIT_MINUTES
    workflow = (ROOT / ".github/workflows/nightly.yml").read_text()
    (minutes,) = re.findall(r"timeout-minutes: (\d+)", workflow)
    assert int(minutes) > LIMIT_MINUTES


def test_a_failed_part_keeps_no_other_away_and_the_first_failure_is_the_code(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown, three, four = (
        python("print('shown')"),
        python("raise SystemExit(3)"),
        python("raise SystemExit(4)"),
    )
    monkeypatch.setattr(nightly, "PARTS", {
        "a": Part("well", 1, (shown,)), "b": Part("badly", 1, (three, shown)),
        "c": Part("badly, too", 1, (four,)), "d": Part("well, too", 1, (shown,)),
    })  # fmt: skip
    assert run_all(["a", "b", "c", "d"]) == 3
    out = capfd.readouterr().out
    assert out.count("shown\n") == 2, "what comes after a failed command of a part is left out"
    for words in ("2/4 b: badly; at most 1 minutes\n", "b FAILED (3) after 0:00:0"):
        assert f"nightly: {words}" in out
    assert re.search(r"^nightly: c +FAILED \(4\) +0:00:0\d  badly, too$", out, re.MULTILINE)
    assert out.endswith('\nnightly: again: make nightly PARTS="b c"\n')
    assert run_all(["a", "d"]) == 0
    assert capfd.readouterr().out.endswith("\nnightly: all parts passed\n")


def test_a_part_that_overruns_is_ended_with_all_it_started(tmp_path: Path) -> None:
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    both = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    part = Part("hangs", 0, (python("pass"),))
    assert nightly.run(part).code == nightly.TIMED_OUT
    began = time.monotonic()
    seconds = 0.5
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert call(python(both), seconds) == nightly.TIMED_OUT
        seconds *= 2  # until there was time to start both
    assert time.monotonic() - began < 55
    pid = int((tmp_path / "pid").read_text())
    while os.path.isdir(f"/proc/{pid}") and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() - began < 55


def test_a_part_that_overruns_may_put_away_what_it_made(tmp_path: Path) -> None:
    mark, seconds = tmp_path / "mark", 0.5
    waits = f"import os, time; m = {str(mark)!r}; open(m, 'w').close()\ntry: time.sleep(60)\n"
    code = f"{waits}finally: os.rename(m, m + 's')"
    while not Path(f"{mark}s").exists():
        assert call(python(code), seconds) == nightly.TIMED_OUT
        seconds *= 2


def test_a_signal_is_a_code_above_128_and_a_stop_ends_the_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(python("import os; os.kill(os.getpid(), 9)"), 60) == 128 + signal.SIGKILL

    def interrupted(part: Part) -> Result:
        raise KeyboardInterrupt

    monkeypatch.setattr(nightly, "run", interrupted)
    assert run_all(["parity", "gpu"]) == nightly.INTERRUPTED
    assert capsys.readouterr().out.endswith('again: make nightly PARTS="parity gpu"\n')


def test_parts_are_named_and_listed() -> None:
    def program(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tests.nightly", *words],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    listed = program("--list")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(PARTS)
    wrong = program("parity", "speed")
    assert wrong.returncode == 2 and f"no part speed; there are: {', '.join(PARTS)}" in wrong.stderr


def test_times_and_a_part_not_run_are_told() -> None:
    assert clock(3723.4) == "1:02:03"
    lines = summary(["slow", "gpu"], {"slow": Result(nightly.TIMED_OUT, 75 * 60)})
    assert re.match(r"slow +TIMED OUT +1:15:00 ", lines[0])
    assert re.match(r"gpu +not run ", lines[1])
