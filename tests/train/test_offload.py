"""A run with its state in host memory is the run without: the same state, resumed either way."""

from __future__ import annotations

from pathlib import Path

from tests.train.runs import alone

HOST = "--optimizer-cpu-offload"
DATA = ("--mock-data", "--bf16")


def test_runs_end_with_the_state_of_those_without_and_resume_them(tmp_path: Path) -> None:
    beside = alone(*DATA)
    host = alone(*DATA, HOST, "--save", str(tmp_path), "--save-interval", "2", "--async-save")
    assert (beside.rc, host.rc) == (0, 0), host.err
    assert host.state_hash == beside.state_hash
    assert "a CPU is its own host" in host.out and "a CPU is its own host" not in beside.out
    for flags in ([], [HOST, "--optimizer-offload-fraction", "0.5"]):
        resumed = alone(*DATA, *flags, "--load", str(tmp_path), "--ckpt-step", "2")
        assert resumed.rc == 0, resumed.err
        assert resumed.state_hash == beside.state_hash
