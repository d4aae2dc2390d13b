"""A run that is asked to stop finishes its step, saves, and says by its exit code who asked."""

from __future__ import annotations

import gc
import os
import re
import signal
import time
from pathlib import Path

import pytest

from megatron_lite.checkpoint.store import Store
from megatron_lite.config.errors import PREEMPTED
from megatron_lite.config.sections.train import TrainConfig
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.telemetry.record import SaveRecord
from megatron_lite.train.ending.stop import NO_VOTE, Stopped, StopRequests, StopVote, stop_signals
from megatron_lite.train.step import begin_step
from tests.support.launch import TINY, start
from tests.support.sizes import with_flags
from tests.train.runs import LONG, alone, argv, records, steps


def pointer(folder: Path) -> int:
    return int((folder / "latest_checkpointed_iteration.txt").read_text())


@pytest.mark.parametrize("layout", ["--micro-batch-size 1", "--pipeline-model-parallel-size 2"])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(
    layout: str, data: list[str], folder: Path
) -> None:
    words = [*data, *LONG, "--save", str(folder), "--save-interval", "100000", *layout.split()]
    with start(2, argv(*words)) as running:
        running.wait_for(1, "iteration        3/")
        running.kill(1, signal.SIGTERM)
        ended = running.wait(60)
    assert [rank.rc for rank in ended] == [PREEMPTED, PREEMPTED], ended[0].err
    assert "stopped by a signal: the step was finished" in ended[0].out
    stopped_at = pointer(folder)
    assert steps(folder)[-1].iteration == stopped_at >= 3
    resumed = [*LONG, "--load", str(folder), "--exit-interval", str(stopped_at + 1)]
    again = alone(*data, *resumed, *layout.split()[:0], "--micro-batch-size", "1")
    assert again.rc == 0, again.err
    assert f"loaded checkpoint from {folder} at iteration {stopped_at}" in again.out


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGUSR1,
        *(pytest.param(n, marks=pytest.mark.ci) for n in (signal.SIGHUP, signal.SIGQUIT)),
        signal.SIGXCPU,
    ],
)
def test_a_signal_in_one_process_is_the_same(
    number: signal.Signals, data: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signal_and_begin(run, batches, vote):
        if run.progress.step == 1:
            os.kill(os.getpid(), number)
        return begin_step(run, batches, vote)

    monkeypatch.setattr("megatron_lite.train.loop.begin_step", signal_and_begin)
    words = ["--save", str(folder), "--save-interval", "100000", "--eval-iters", "1"]
    done = alone(*data, *LONG, *words)
    assert done.rc == PREEMPTED
    assert pointer(folder) in (2, 3)  # asked during step 2: known before or after its vote
    assert "validation loss" not in done.out, "a preempted run has no time for an evaluation"


def test_a_hang_up_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals() and signal.SIGTERM in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in stop_signals()


def test_a_signal_during_a_save_lets_it_finish_once(data: list[str], folder: Path) -> None:
    words = [*data, *LONG, "--save", str(folder), "--save-interval", "3"]
    with start(1, argv(*words), fault="save.after_share:0:sigterm") as running:
        (ended,) = running.wait(60)
    assert ended.rc == PREEMPTED, ended.err
    saved = [record.iteration for record in records(folder) if isinstance(record, SaveRecord)]
    assert saved == [3, 4] and pointer(folder) == 4, "the next step learns of it, and saves its own"


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_with_the_older_checkpoint(
    second: signal.Signals, data: list[str], folder: Path
) -> None:
    """In the middle of a step that takes a minute; a SIGTERM counts only half a minute later."""
    words = [*data, *LONG, "--save", str(folder), "--save-interval", "2"]
    with start(1, argv(*words), fault="step4:0:sleep60") as running:
        running.wait_for(0, "iteration        3/")
        for number in (signal.SIGTERM, signal.SIGTERM, second):
            running.kill(0, number)
            time.sleep(0.3)
        if second == signal.SIGTERM:
            assert running.processes[0].is_alive(), "it was only asked again"
            running.kill(0, signal.SIGINT)
        (ended,) = running.wait(40)
    assert ended.rc == 130 and "stopped by Ctrl-C after step 3" in ended.err, ended.err
    assert pointer(folder) == 2


def test_a_late_second_sigterm_ends_at_once() -> None:
    asked = StopRequests(TrainConfig(), patience=0.0)
    asked._note(signal.SIGUSR1, None)
    assert asked.vote().signalled
    asked._note(signal.SIGUSR1, None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Stopped, match="SIGTERM"):
            asked._note(signal.SIGTERM, None)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_exit_interval_stops_with_exit_code_0(data: list[str], folder: Path) -> None:
    done = alone(*data, *LONG, "--save", str(folder), "--exit-interval", "3")
    assert done.rc == 0, done.err
    assert "[stopped by --exit-interval] iteration 3" in done.out
    assert pointer(folder) == 3


def test_exit_duration_stops_after_the_step(data: list[str], folder: Path) -> None:
    done = alone(*data, *LONG, "--save", str(folder), "--exit-duration-in-mins", "0.0001")
    assert done.rc == 0, done.err
    assert "[stopped by --exit-duration-in-mins]" in done.out
    assert pointer(folder) == steps(folder)[-1].iteration < 100


def test_without_the_handler_a_signal_ends_the_process(data: list[str], folder: Path) -> None:
    words = [*data, *LONG, "--save", str(folder), "--save-interval", "100000"]
    with start(1, argv(*words, "--no-exit-signal-handler")) as running:
        running.wait_for(0, "iteration        1/")
        running.kill(0, signal.SIGTERM)
        (ended,) = running.wait(60)
    assert ended.rc not in (0, PREEMPTED)
    assert not (folder / "latest_checkpointed_iteration.txt").exists()


@pytest.mark.parametrize(
    ("vote", "finished", "step", "reason"),
    [
        (NO_VOTE, False, 7, None),
        (NO_VOTE, False, 10, "exit-interval"),
        (StopVote(over_time=True), False, 10, "exit-duration"),
        (StopVote(signalled=True, over_time=True), False, 10, "signal"),
        (StopVote(signalled=True, over_time=True), True, 10, "finished"),
    ],
)
def test_all_ranks_give_one_reason(
    vote: StopVote, finished: bool, step: int, reason: str | None
) -> None:
    asked = StopRequests(TrainConfig(exit_interval=5))
    assert asked.reason(step, agreed=vote, finished=finished) == reason


def test_manual_gc_collects_at_its_interval_only(
    data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled, collected = [], []
    collect = gc.collect

    def look_and_begin(run, batches, vote):
        enabled.append(gc.isenabled())
        return begin_step(run, batches, vote)

    monkeypatch.setattr("megatron_lite.train.loop.begin_step", look_and_begin)
    monkeypatch.setattr(
        "megatron_lite.train.loop.gc.collect", lambda: collected.append(len(enabled)) or collect()
    )
    assert alone(*data, "--manual-gc", "--manual-gc-interval", "2").rc == 0
    assert enabled == [False] * 4
    assert collected == [0, 2, 4]
    assert gc.isenabled()


@pytest.mark.ci
def test_a_signal_while_a_checkpoint_is_written_beside_the_steps(tmp_path: Path) -> None:
    """Both are kept, the one under way and that of the last step; exit 75 comes after both."""
    folder = tmp_path / "run"
    words = ["--train-iters", "100000", "--save", str(folder), "--save-interval", "2"]
    running = start(
        2, with_flags(TINY, *words, "--async-save"), fault="save.before_complete:0:sleep3"
    )
    running.wait_for(1, "iteration        3/")
    assert not (folder / "iter_0000002").exists(), "the steps went on before it was complete"
    running.kill(1, signal.SIGTERM)
    ended = running.wait(90)
    assert [rank.rc for rank in ended] == [75, 75], ended[0].err
    store = Store(folder, ParallelContext.serial())
    newest, notices = store.newest_intact()
    assert newest is not None and not notices
    assert newest.iteration > 2 and 2 in store.iterations()
    said = re.search(r"stopped by a signal.*\] iteration +(\d+)", ended[0].out)
    assert said and int(said[1]) == newest.iteration
