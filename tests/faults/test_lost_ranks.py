"""A killed, stopped, hanging or failing rank is named by all the others, in time, with code 6.

The runs of a group are started together: most of their time is waiting.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launch import TINY, Ended, Running, StillAlive, launch, start
from tests.support.sizes import with_flags

TIMEOUT_MINUTES = 0.15  # 9 s: what a stopped or hanging rank costs, and a killed one far less
TIMED = [*TINY, "--distributed-timeout-minutes", str(TIMEOUT_MINUTES)]
ZERO3 = ["--zero-stage", "3", "--micro-batch-size", "1"]
PP2 = ["--pipeline-model-parallel-size", "2"]

# name: (ranks, fault, more flags)
KILLED = {
    "process group": (2, "init:1:sigkill", []),
    "process group of the store's host": (2, "init:0:sigkill", []),
    "start": (2, "start:1:sigkill", []),
    "step": (2, "step3:1:sigkill", []),
    "forward of a stage": (2, "step3.forward:1:sigkill", PP2),
    "backward of one of four": (4, "step3.backward:2:sigkill", PP2),
    "inside a layer": (2, "step3.forward:1:sigkill", ["--tensor-model-parallel-size", "2"]),
    "gather of weights": (2, "step3.forward:1:sigkill", ZERO3),
    "gather of weights again": (2, "step3.backward:1:sigkill", ZERO3),
    "gradient": (2, "step3.gradient:1:sigkill", []),
    "reduce": (2, "step3.reduce:1:exit", []),
    "evaluation": (2, "evaluate:1:sigkill", ["--eval-iters", "2", "--eval-interval", "2"]),
    "save": (2, "save.after_share:1:sigkill", ["--save-interval", "2"]),
    "the store's host": (2, "step3.forward:0:sigkill", []),
}
SILENT = {
    "stopped": (2, "step3:1:sigstop", []),
    "store stopped": (2, "step3:0:sigstop", []),
    "hangs": (2, "step3:1:hang", []),
}
Case = tuple[int, str, list[str]]


def begin(case: Case, folder: Path) -> Running:
    ranks, fault, flags = case
    save = ["--save", str(folder)] if "--save-interval" in flags else []
    return start(ranks, with_flags(TIMED, *flags, *save), fault=fault)


def fault_of(case: Case) -> tuple[int, int]:
    """(rank that fails, last finished step)."""
    point, rank, _ = case[1].split(":")
    step = re.match(r"step(\d+)", point)
    return int(rank), int(step[1]) - 1 if step else -1 if point in ("init", "start") else 2


def require_named(ended: list[Ended], case: Case) -> None:
    lost, step = fault_of(case)
    for rank in ended:
        if rank.rank == lost:
            continue
        assert rank.rc == 6, (rank.rc, rank.err[-2000:])
        # the sums of a step may be complete when the lost rank leaves: then the others finish it
        at = "-" if step < 0 else f"[{step}{step + 1}]" if ".reduce" in case[1] else step
        begins = rf"FATAL\[6\] rank={rank.rank} step={at}: rank {lost}\b"
        assert re.match(begins, rank.fatal), rank.err
        assert re.search(r"(was lost|hangs)\b.* - last finished step .* - look at", rank.fatal), (
            rank.fatal
        )
        assert rank.err.count("FATAL") == 1 and "Traceback" not in rank.err


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Running]]:
    folder = tmp_path_factory.mktemp("running") / "save"
    running = {name: begin(case, folder) for name, case in (SILENT | KILLED).items()}
    yield running
    for run in running.values():
        run.close()


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_rank_is_named(running, name) -> None:
    require_named(running[name].wait(45), KILLED[name])


def test_a_killed_rank_is_named_long_before_the_timeout() -> None:
    """Its connections break: nobody waits the minutes that a silent rank may take."""
    argv = with_flags(TINY, "--distributed-timeout-minutes", "5")
    case = (2, "step3.backward:1:sigkill", [])
    ended = launch(2, argv, fault=case[1], deadline=60)
    require_named(ended, case)
    assert ended[1].rc == -signal.SIGKILL
    assert ended[0].seconds - ended[1].seconds < 20


@pytest.mark.parametrize("name", SILENT)
def test_a_silent_rank_is_named_within_the_timeout(running, name) -> None:
    lost, _ = fault_of(SILENT[name])
    ended = running[name].wait(45, stopped=[lost] if "stopped" in name else [])
    require_named(ended, SILENT[name])
    if name == "hangs":
        assert all(rank.rc == 6 and "faults.py" in rank.fatal for rank in ended)


# fault: (exit code and words of the rank itself, of the other)
FAILING = {
    "step2:1:error3": (3, "on purpose", 6, "rank 1 failed first: FATAL[3] rank=1 step=1:"),
    "start:0:error4": (4, "on purpose", 6, "rank 0 failed first: FATAL[4] rank=0 step=-:"),
    "step2.backward:1:bug": (70, "RuntimeError: a bug", 6, "rank 1 failed first: FATAL[70]"),
    "step2.gradient:0:nan": (7, "gradient norm is nan", 7, "gradient norm is nan"),
    "start:1:sigterm": (143, "stopped by SIGTERM before the first step", 6, "rank 1 failed first"),
    "start:0:sigint": (130, "stopped by Ctrl-C before the first step", 6, "rank 0 failed first"),
}


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Running, Path]]]:
    running = {}
    for number, fault in enumerate(FAILING):
        save = tmp_path_factory.mktemp("failing") / str(number)
        flags = [*TIMED, "--save", str(save), "--save-interval", "100"]
        running[fault] = (start(2, flags, fault=fault), save)
    yield running
    for run, _ in running.values():
        run.close()


@pytest.mark.parametrize("fault", FAILING)
def test_the_first_failure_is_what_the_others_print(failing, fault) -> None:
    run, save = failing[fault]
    own_code, own_words, others_code, others_words = FAILING[fault]
    one = int(fault.split(":")[1])
    ended = run.wait(45)
    expected = {one: (own_code, own_words), 1 - one: (others_code, others_words)}
    for rank in ended:
        code, words = expected[rank.rank]
        assert rank.rc == code, (rank.rc, rank.err[-2000:])
        assert rank.fatal.startswith(f"FATAL[{code}] rank={rank.rank} step=")
        assert words in rank.fatal.splitlines()[0], rank.fatal
        assert ("Traceback" in rank.err) == (code == 70)
        kept = json.loads((save / "errors" / f"rank{rank.rank}.json").read_text())
        assert (kept["rank"], kept["exit_code"]) == (rank.rank, code) and words in kept["fatal"]


def test_slow_is_not_lost_and_a_stopped_run_can_go_on() -> None:
    """A rank that sleeps or is stopped for less than the timeout holds nobody up for good."""
    running = start(2, TIMED, fault="step3:1:sleep2")
    running.wait_for(1, "iteration        2/")
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in (0, 1):
            running.kill(rank, number)
    ended = running.wait(45)
    assert [rank.rc for rank in ended] == [0, 0], ended
    assert "FATAL" not in ended[0].err + ended[1].err


def test_the_launcher_names_and_kills_who_still_runs() -> None:
    running = start(2, TINY, fault="step2:1:hang")
    with pytest.raises(StillAlive, match=r"ranks \[0, 1\] still ran after 4 s"):
        running.wait(4)
    assert not any(process.is_alive() for process in running.processes.values())


# fault: iterations that may load afterwards; rank 0 completes a save of which it has all shares
SAVING = {
    "save.begin:0:sigkill": {1},
    "save.begin:1:sigkill": {1},
    "save.after_share:0:sigkill": {1},
    "save.after_share:1:sigkill": {1, 2},
    "save.before_complete:0:sigkill": {1},
    "save.end:0:sigkill": {2},
    "save.end:1:sigkill": {2},
}


WHOLE = ["--tensor-model-parallel-size", "2", "--optimizer"]
OF_WHOLE_MATRICES = {
    "muon": [*WHOLE, "muon"],
    "galore": [*WHOLE, "galore", "--galore-rank", "4", "--galore-update-proj-gap", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OF_WHOLE_MATRICES)
def test_states_of_whole_matrices_survive_a_kill_while_saving(tmp_path, optimizer) -> None:
    """The run that goes on has the bits of one that was never interrupted."""

    def flags(save: Path) -> list[str]:
        more = ["--save", str(save), "--save-interval", "1", "--load", str(save)]
        return with_flags(TIMED, *OF_WHOLE_MATRICES[optimizer], *more, "--print-state-hash")

    def state(ended: list[Ended]) -> str:
        assert [rank.rc for rank in ended] == [0, 0], ended[0].err
        return re.findall(r"state hash at iteration \d+: ([0-9a-f]{16,})", ended[0].out)[-1]

    hashes = {state(launch(2, flags(tmp_path / "never")))}
    for number, fault in enumerate(
        ("save.after_share:1:sigkill", "save.before_complete:0:sigkill")
    ):
        folder = tmp_path / str(number)
        launch(2, [*flags(folder), "--exit-interval", "1"])
        start(2, flags(folder), fault=fault).wait(90)
        hashes.add(state(launch(2, flags(folder))))
    assert len(hashes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("way", [[], ["--async-save"], ZERO3, [*ZERO3, "--async-save"]])
def test_a_save_survives_the_loss_of_any_rank_at_any_point(tmp_path, way) -> None:
    """The save of iteration 2 is interrupted; the run goes on from 1, or from 2 if that is whole."""

    def flags(save: Path) -> list[str]:
        return [*TIMED, "--save", str(save), "--save-interval", "1", "--load", str(save), *way]

    first = launch(2, [*flags(tmp_path / "first"), "--exit-interval", "1"])
    assert [rank.rc for rank in first] == [0, 0], first[0].err
    folders = {fault: tmp_path / str(number) for number, fault in enumerate(SAVING)}
    for folder in folders.values():
        shutil.copytree(tmp_path / "first", folder)
    interrupted = {f: start(2, flags(folder), fault=f) for f, folder in folders.items()}
    for fault, running in interrupted.items():
        lost = int(fault.split(":")[1])
        other = running.wait(90)[1 - lost]
        assert other.rc == 6 and f": rank {lost}" in other.fatal, (fault, other.err)
    for fault, folder in folders.items():
        again = launch(2, flags(folder))
        assert [rank.rc for rank in again] == [0, 0], again[0].err
        resumed = re.search(r"loaded checkpoint from .* at iteration +(\d+)", again[0].out)
        assert resumed and int(resumed[1]) in SAVING[fault], (fault, again[0].out)
        assert not list(folder.glob(".*partial"))
