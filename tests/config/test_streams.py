"""A stream that takes no text holds nobody up; its text comes later, or is counted."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lite.config import streams
from megatron_lite.config.errors import StorageError
from megatron_lite.config.streams import Outlet, ReaderGone
from tests.support.places import ROOT


@pytest.fixture
def pipe() -> Iterator[list[int]]:
    """[read end, write end]; a test that closes one takes it out."""
    ends = list(os.pipe())
    yield ends
    for end in ends:
        os.close(end)


def beside(outlet: Outlet, tmp_path: Path) -> Path:
    """Where the outlet's witness writes."""
    path = tmp_path / "witness"
    witness = Outlet("stderr", os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), None)
    outlet.witness, witness.witness = witness, outlet
    return path


def test_a_full_disk_is_told_once_and_counted(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        outlet = Outlet("stdout", full.fileno(), None)
        witness = beside(outlet, tmp_path)
        for line in range(5):
            print(line, file=outlet, flush=True)
        assert witness.read_text().startswith("WARNING: stdout takes no more text (No space left")
        assert witness.read_text().count("\n") == 1
        assert outlet.summary() == "stdout: 5 lines were lost (No space left on device)"


def test_what_waited_comes_when_the_reader_goes_on(pipe: list[int], monkeypatch) -> None:
    """A reader that stands still (Ctrl-S, a stopped pager) costs a moment once; nothing is lost."""
    monkeypatch.setattr(streams, "READER_PATIENCE_SECONDS", 0.3)
    outlet = Outlet("stdout", pipe[1], None)
    lines = [f"line {number} {'x' * 90}" for number in range(2000)]
    began = time.monotonic()
    for line in lines:
        print(line, file=outlet, flush=True)
    assert outlet.failing and time.monotonic() - began < 3.0
    seen = b""
    while seen.count(b"\n") < len(lines):
        seen += os.read(pipe[0], 65536)
        outlet.flush()
    assert seen.decode().splitlines() == lines
    assert not outlet.failing and outlet.summary() == ""


def test_what_no_longer_fits_is_marked_where_it_is_missing(pipe: list[int], monkeypatch) -> None:
    monkeypatch.setattr(streams, "READER_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(streams, "WAITING_BYTES", 1000)
    outlet = Outlet("stdout", pipe[1], None)
    for number in range(2000):
        print(f"line {number} {'x' * 90}", file=outlet, flush=True)
    seen = os.read(pipe[0], 65536)
    print("the end", file=outlet, flush=True)
    seen += os.read(pipe[0], 65536)
    assert not outlet.failing
    (*_, lost) = map(int, re.findall(r"^\[(\d+) lines were lost up to here", seen.decode(), re.M))
    whole = [line for line in seen.decode().splitlines() if line.endswith("x" * 90)]
    assert 1999 <= len(whole) + lost <= 2000, "the line on the way when it began is cut off"
    assert outlet.summary().startswith(f"stdout: {lost} lines")


def test_a_pipe_nobody_reads_any_more_raises_nothing(pipe: list[int], tmp_path: Path) -> None:
    os.close(pipe.pop(0))
    outlet = Outlet("stdout", pipe[0], None)
    witness = beside(outlet, tmp_path)
    print("a", file=outlet, flush=True)
    assert "Broken pipe" in witness.read_text()


def test_where_neither_stream_works_the_warning_goes_elsewhere() -> None:
    kept: list[str] = []
    both = [Outlet(name, None, None) for name in ("stdout", "stderr")]
    for outlet, witness in (both, both[::-1]):
        outlet.witness = witness
    print("a", file=both[0], flush=True)
    for outlet in both:
        outlet.confide(kept.append)
    assert {line.split(" takes")[0] for line in kept} == {"WARNING: stderr", "WARNING: stdout"}


def test_a_character_the_encoding_lacks_is_written_in_ascii(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w", encoding="latin-1") as old:
        print("é → \ud800", file=Outlet("stdout", old.fileno(), old), flush=True)
    assert (tmp_path / "out").read_bytes() == b"\xe9 \\u2192 \\ud800\n"


def test_results_that_cannot_be_printed_are_an_error(pipe: list[int]) -> None:
    with open("/dev/full", "wb") as full, pytest.raises(StorageError, match="No space left"):
        print("a", file=Outlet("stdout", full.fileno(), None, strict=True))
    os.close(pipe.pop(0))
    with pytest.raises(ReaderGone):
        print("a", file=Outlet("stdout", pipe[0], None, strict=True))


def command(tool: str, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / tool), *words]


PLAN = command("plan.py", "--preset", "gpt2-124m", "--micro-batch-size", "1", "--train-iters", "5",
               "--lr", "1e-3", "--mock-data", "--use-cpu", "--world-size", "1")  # fmt: skip


@pytest.mark.ci
def test_a_tool_whose_result_is_its_output() -> None:
    """`plan > /dev/full` is 5; `plan | head` ends as other programs do, without a word."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(PLAN, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("FATAL[5]") and done.stderr.count("\n") == 1
    assert into_a_closed_pipe(PLAN) == (141, "")


def into_a_closed_pipe(words: list[str]) -> tuple[int, str]:
    """The exit code and stderr of a program whose reader is gone."""
    ends = os.pipe()
    os.close(ends[0])
    with contextlib.closing(os.fdopen(ends[1], "wb")) as broken:
        done = subprocess.run(words, stdout=broken, stderr=subprocess.PIPE, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.ci
def test_help_and_a_dry_run_end_with_their_reader() -> None:
    """Of tools, too, whose results are files: there is no work to go on with."""
    for words in (
        command("convert.py", "--help"),
        command("pretrain_gpt.py", "--dry-run", *PLAN[2:]),
    ):
        assert into_a_closed_pipe(words) == (141, "")
