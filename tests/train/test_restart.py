"""torchrun restarts failed ranks: they resume by themselves, and stop where that is hopeless."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_lite.checkpoint.store import POINTER
from megatron_lite.cli import launch as launcher
from megatron_lite.cli.launch import exit_code
from megatron_lite.config.exit import run_tool
from megatron_lite.config.sections.train import TrainConfig
from megatron_lite.storage.disk import Disk
from megatron_lite.train.ending.restart import (
    Ended,
    begin_attempt,
    last_crash,
    refusal,
    write_ended,
)
from tests.support.launch import LAUNCHER, LAUNCHER_NAMES, TOOL, start
from tests.train.runs import LONG, Outcome, argv, on_ranks, steps


def failed(folder: Path, rank: int, code: int, error: str, when: float = 1.0) -> None:
    (folder / "errors").mkdir(exist_ok=True, parents=True)
    entry = {"rank": rank, "exit_code": code, "step": 2, "error": error, "time": when}
    (folder / "errors" / f"rank{rank}.json").write_text(json.dumps(entry))


def lost(seconds: float) -> str:
    return f"rank 1 was lost: no sign of life for {seconds} s - last finished step 2, last seen in x.py:7"


def test_the_rank_that_spoke_first_is_the_cause(tmp_path: Path) -> None:
    assert last_crash(tmp_path) is None
    failed(tmp_path, 0, 6, "rank 2 failed first: FATAL[3] ...", 1.0)
    failed(tmp_path, 1, 7, "the loss is nan", 3.0)
    failed(tmp_path, 2, 3, "no such file", 2.0)
    (tmp_path / "errors" / "rank3.json").write_text("{half of")
    crash = last_crash(tmp_path)
    assert crash is not None and (crash.exit_code, crash.what) == (3, "no such file")


def test_the_same_crash_twice_is_not_tried_a_third_time(tmp_path: Path) -> None:
    attempt = 0
    for attempt, seconds in enumerate((11.5, 12.25)):
        assert refusal(TrainConfig(), tmp_path, attempt=attempt) is None
        begin_attempt(tmp_path, Disk(), attempt=attempt)
        failed(tmp_path, 0, 6, lost(seconds), 1.0)
        failed(tmp_path, 2, 6, lost(seconds), 2.0)
    found = refusal(TrainConfig(), tmp_path, attempt=2)
    assert found is not None and found.exit_code == 6
    assert re.match(
        "not started again: 2 attempts ended with the same .* rank 1 was lost", str(found)
    )
    failed(tmp_path, 0, 6, str(found), 9.0)
    again = refusal(TrainConfig(), tmp_path, attempt=3)
    assert again is not None and again.told and again.exit_code == 6 and not found.told
    assert refusal(TrainConfig(), tmp_path, attempt=0) is None, "a person may start it again"


@pytest.mark.parametrize("progress", ["a checkpoint", "another failure"])
def test_a_crash_after_progress_is_tried_again(progress: str, tmp_path: Path) -> None:
    for attempt in range(4):
        assert refusal(TrainConfig(), tmp_path, attempt=attempt) is None
        begin_attempt(tmp_path, Disk(), attempt=attempt)
        (tmp_path / POINTER).write_text(f"{attempt if progress == 'a checkpoint' else 7}\n")
        failed(tmp_path, 0, 70, "a bug" + ("" if progress == "a checkpoint" else f" no. {attempt}"))
    begin_attempt(tmp_path, Disk(), attempt=0)
    assert not (tmp_path / "errors").exists(), "a new launch begins with a clean folder"


def test_a_run_that_was_asked_to_stop_is_not_restarted(tmp_path: Path) -> None:
    write_ended(tmp_path, Ended(75, "signal", 12), Disk())
    found = refusal(TrainConfig(), tmp_path, attempt=1)
    assert found is not None and found.exit_code == 75 and "iteration 12" in str(found)
    assert refusal(TrainConfig(), tmp_path, attempt=0) is None
    begin_attempt(tmp_path, Disk(), attempt=0)
    assert not (tmp_path / "ended.json").exists()


def test_the_exit_code_of_a_host_is_the_one_that_explains() -> None:
    assert exit_code([6, 3]) == 3 and exit_code([6, 70]) == 70
    assert exit_code([-9, 6]) == 6 and exit_code([-9]) == 6 and exit_code([6, 143]) == 6
    assert exit_code([75, 75]) == 75 and exit_code([75, -9]) == 6
    assert exit_code([143, -15]) == 143 and exit_code([130]) == 130


# -- with torchrun --------------------------------------------------------------------------------


class Launched:
    """tools/launch.py with two ranks, or torchrun itself."""

    def __init__(self, *words: str, launcher: str = "", fault: str = "") -> None:
        own = {name: v for name, v in os.environ.items() if name not in LAUNCHER_NAMES}
        env = own | {"OMP_NUM_THREADS": "1", "MLITE_FAULT": fault}
        torchrun = ["-m", "torch.distributed.run"] if launcher == "torchrun" else [str(LAUNCHER)]
        flags = ["--nproc_per_node", "2", *(w for w in words if w.startswith("--max_restarts"))]
        self.process = subprocess.Popen(
            [sys.executable, *torchrun, *flags, str(TOOL),
             *argv(*(w for w in words if not w.startswith("--max_restarts")))],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait(self, seconds: float = 120) -> Outcome:
        """Ends it if it does not end."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        finally:
            if self.process.poll() is None:
                self.process.terminate()
        return Outcome(self.process.returncode, out, err)


@pytest.mark.parametrize(
    ("sizes", "words", "told"),
    [
        (["--standalone"], ["--gloal-batch-size", "4"], "did you mean --global-batch-size?"),
        (["--nnodes", "2"], ["--global-batch-size", "6"], "6 is not divisible by"),
        (["--nnodes", "1:1"], ["--hidden-size", "30"], "--hidden-size 30"),
    ],
)
def test_what_every_rank_would_refuse_the_launcher_refuses_once(
    sizes: list[str], words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    command = [
        "launch.py",
        *sizes,
        "--nproc_per_node",
        "8",
        str(TOOL),
        *argv("--mock-data", "--global-batch-size", "16", *words),
    ]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(launcher, "run", lambda asked: pytest.fail("ranks were started"))
    assert run_tool(launcher.main) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == err.count("FATAL[") == 1 and told in err, err


def test_of_torchruns_own_lines_only_those_of_killed_ranks_are_news() -> None:
    log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    before = list(log.filters)
    launcher.quieten()
    try:
        texts = ("Sending process %s closing signal SIGTERM", "failed (exitcode: %s) local_rank: 0")
        seen = [
            bool(log.filter(log.makeRecord("a", logging.ERROR, "f", 1, text, (number,), None)))
            for text, number in ((texts[0], 7), (texts[1], 2), (texts[1], -9))
        ]
    finally:
        log.filters = before
    assert seen == [False, False, True]


@pytest.mark.ci
def test_of_the_ranks_that_cannot_start_one_speaks(tmp_path: Path) -> None:
    """Found by every rank before they meet: one FATAL, and nothing of torchrun's beside it."""
    files = ["--vocab-file", str(tmp_path / "no.json"), "--merge-file", str(tmp_path / "no.txt")]
    done = Launched("--mock-data", "--tokenizer-type", "GPT2BPETokenizer", *files).wait()
    assert done.rc == 3
    first, *named, way = done.err.splitlines()
    assert first.startswith("FATAL[3]") and way.startswith("copy them here"), done.err
    assert [line.split()[0] for line in named] == ["--vocab-file", "--merge-file"], done.err


@pytest.mark.ci
def test_torchrun_resumes_by_itself_with_the_state_of_an_uninterrupted_run(
    data: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = [*data, "--save", str(folder), "--load", str(folder), "--save-interval", "1"]
    fault = "step3.backward:1:sigkill:once"
    done = Launched(*words, "--max_restarts=2", launcher="torchrun", fault=fault).wait()
    assert done.rc == 0, done.err[-3000:]
    assert "FATAL[6] rank=0 step=2: rank 1 was lost" in done.err
    assert f"loaded checkpoint from {folder} at iteration 2" in done.out
    assert done.state_hash == on_ranks(2, *data).state_hash
    assert [step.iteration for step in steps(folder)] == [1, 2, 3, 4]
    assert json.loads((folder / "ended.json").read_text())["exit_code"] == 0
    (before,) = json.loads((folder / "errors/earlier.json").read_text())["attempts"]
    assert before["exit_code"] == 6 and "rank 1 was lost" in before["what"]


@pytest.mark.ci
def test_a_crash_that_comes_again_ends_with_its_code_and_is_explained_once(
    data: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = [*data, "--save", str(folder), "--load", str(folder), "--save-interval", "100"]
    done = Launched(*words, "--max_restarts=3", fault="step2:1:error7").wait()
    assert done.rc == 7, done.err[-3000:]
    assert len(re.findall(r"^FATAL\[7\] rank=1 step=1: on purpose", done.err, re.M)) == 2
    told = "FATAL[7] rank=0 step=-: not started again: 2 attempts ended with the same failure"
    assert done.err.count(told) == 1


@pytest.mark.ci
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 0)])
def test_a_signal_to_the_launcher_saves_and_gives_the_asked_code(
    number: int, code: int, data: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = [*data, *LONG, "--save", str(folder), "--save-interval", "100000"]
    launched = Launched(*words, "--exit-code-on-preemption", str(code), "--max_restarts=2")
    end = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or len(steps(folder)) < 2:
        assert time.monotonic() < end and launched.process.poll() is None
        time.sleep(0.05)
    launched.process.send_signal(number)
    done = launched.wait(60)
    assert done.rc == code, done.err[-3000:]
    assert "stopped by a signal: the step was finished" in done.out
    ended = json.loads((folder / "ended.json").read_text())
    assert ended == {
        "exit_code": code,
        "reason": "signal",
        "iteration": steps(folder)[-1].iteration,
    }
    assert (folder / POINTER).read_text().strip() == str(ended["iteration"])


# -- the kill switch ------------------------------------------------------------------------------


def test_a_kill_switch_stops_all_ranks_with_a_checkpoint_and_keeps_the_next_start_away(
    data: list[str], tmp_path: Path
) -> None:
    folder, switch = tmp_path / "run", tmp_path / "stop"
    words = [*data, *LONG, "--save", str(folder), "--save-interval", "100000"]
    flags = argv(*words, "--kill-switch-file", str(switch), "--micro-batch-size", "1")
    with start(2, flags) as running:
        running.wait_for(1, "iteration        3/")
        switch.touch()
        ended = running.wait(60)
    assert [rank.rc for rank in ended] == [75, 75], ended[0].err
    assert f"[stopped by --kill-switch-file {switch}]" in ended[0].out
    assert int((folder / POINTER).read_text()) == steps(folder)[-1].iteration >= 3
    again = on_ranks(2, *words, "--kill-switch-file", str(switch), "--load", str(folder))
    assert again.rc == 2 and again.err.count("FATAL[2]") == 1, again.err
    assert f"--kill-switch-file {switch} exists" in again.err and "remove it" in again.err
