"""Nothing that a run says or logs ends it: full, closed and broken outputs, full log disks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_lite.config.errors import StorageError
from megatron_lite.storage.faults import FaultyDisk
from megatron_lite.train import program
from megatron_lite.train.measuring import timeline
from tests.support.launch import LAUNCHER, LAUNCHER_NAMES, TINY, TOOL, start
from tests.support.rights import needs_namespaces
from tests.support.sizes import with_flags
from tests.train.runs import alone, records, steps


def test_a_full_disk_under_both_outputs_is_told_in_the_run_folder(tmp_path: Path) -> None:
    """`run > log 2>&1` on a disk that is full: exit 0, all metrics, a checkpoint."""
    save = tmp_path / "run"
    words = with_flags(TINY, "--save", str(save))
    (ended,) = start(1, words, outputs={"out": "/dev/full", "err": "/dev/full"}).wait(60)
    assert ended.rc == 0
    assert [step.iteration for step in steps(save)] == list(range(1, 7))
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "6"
    told = (save / "errors" / "output-rank0.txt").read_text()
    assert "stdout takes no more text (No space left on device)" in told
    assert "lines were lost (No space left on device)" in told


def test_a_failing_run_keeps_its_own_exit_code(tmp_path: Path) -> None:
    words = with_flags(TINY, "--save", str(tmp_path / "run"))
    outputs = {"out": "/dev/full", "err": "/dev/full"}
    ended = start(2, words, outputs=outputs, fault="step3.gradient:0:nan").wait(60)
    assert [rank.rc for rank in ended] == [7, 7]


def test_a_metrics_disk_that_is_full_for_a_while_costs_two_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FaultyDisk(fail_at=2, error=errno.ENOSPC, kinds=("write",))
    monkeypatch.setattr("megatron_lite.telemetry.writers.Disk", lambda: disk)
    monkeypatch.setattr("megatron_lite.telemetry.lasting.PAUSES", (0.0, 0.0))
    done = alone("--mock-data", "--save", str(tmp_path / "run"))
    assert done.rc == 0 and disk.failed, done.err
    assert [step.iteration for step in steps(tmp_path / "run")] == [1, 2, 3, 4]
    assert len(records(tmp_path / "run")) == 5  # the checkpoint, too
    assert done.err.count("takes no more records") == done.err.count("works again") == 1


def test_what_only_describes_a_run_that_is_done_does_not_fail_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("write failed: No space left on device")

    monkeypatch.setattr(program, "write_ended", full)
    monkeypatch.setattr(timeline, "write_atomically", full)
    flags = ["--profile-timeline", "--profile-step-start", "2", "--profile-step-end", "3"]
    done = alone("--mock-data", "--save", str(tmp_path / "run"), *flags)
    assert done.rc == 0, done.err
    assert "how the run ended is not noted" in done.err and "it is lost: write failed" in done.out


def launcher(tmp_path: Path, *words: str) -> list[str]:
    flags = with_flags(TINY, "--save", str(tmp_path / "run"), *words)
    return [
        sys.executable,
        str(LAUNCHER),
        "--nproc_per_node",
        "2",
        "--standalone",
        str(TOOL),
        *flags,
    ]


CLEAN = {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES}


@pytest.mark.slow
@pytest.mark.parametrize("how", [">/dev/full", ">/dev/full 2>&1", ">&-", ">&- 2>&-", "| true"])
def test_the_launcher_ends_with_the_ranks_code_whatever_becomes_of_its_output(
    tmp_path: Path, how: str
) -> None:
    script = f'"$@" {how}; exit "${{PIPESTATUS[0]}}"'
    command = ["bash", "-c", script, "bash", *launcher(tmp_path)]
    done = subprocess.run(command, env=CLEAN, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(steps(tmp_path / "run")) == 6


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU])
def test_other_requests_to_stop_reach_the_ranks_through_the_launcher(
    tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    command = launcher(tmp_path, "--train-iters", "100000")
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, env=CLEAN, stdout=log, stderr=subprocess.STDOUT)
    end = time.monotonic() + 90
    while not (folder / "metrics.jsonl").exists() or len(steps(folder)) < 2:
        assert time.monotonic() < end and process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 75, (tmp_path / "log").read_text()
    pointer = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
    assert int(pointer) == steps(folder)[-1].iteration


FULL = """
set -e
mkdir -p "$1"; mount -t tmpfs -o size=64k none "$1"; head -c 60000 /dev/zero >"$1/filler"
shift
"$@"
"""


@pytest.mark.slow
@pytest.mark.root
def test_a_full_tensorboard_disk_is_a_warning(tmp_path: Path) -> None:
    needs_namespaces()
    logs = tmp_path / "tb"
    flags = with_flags(TINY, "--save", str(tmp_path / "run"), "--tensorboard-dir", str(logs),
                       "--train-iters", "300", "--log-interval", "100")  # fmt: skip
    tool = [sys.executable, str(TOOL), *flags]
    command = ["unshare", "-rm", "bash", "-c", FULL, "bash", str(logs), *tool]
    done = subprocess.run(command, env=CLEAN, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"WARNING: --tensorboard-dir {logs}" in done.stderr, done.stderr
    assert len(steps(tmp_path / "run")) == 300
