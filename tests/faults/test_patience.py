"""Long honest work of one rank at the start ends nobody; one that no longer gets on is named."""

from __future__ import annotations

import threading

import pytest

from megatron_lite.checkpoint.manifest import Manifest, hash_file, verify_files
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.train import patience
from tests.support.launch import TINY, launch, start
from tests.support.sizes import with_flags

SHORT = with_flags(TINY, "--distributed-timeout-minutes", "0.05")  # 3 s


@pytest.mark.ci
def test_others_wait_for_work_that_is_longer_than_the_timeout_and_not_for_a_hang() -> None:
    works = start(2, SHORT, fault="data:0:busy6")
    hangs = start(2, SHORT, fault="data:0:hang")
    ended = works.wait(90)
    assert [rank.rc for rank in ended] == [0, 0], ended[1].err
    ended = hangs.wait(90)
    assert [rank.rc for rank in ended] == [6, 6], ended[1].err
    assert all("rank 0 hangs while the others wait" in rank.fatal for rank in ended)
    assert all("faults.py" in rank.fatal for rank in ended)


@pytest.mark.slow
def test_ranks_wait_likewise_for_a_tokenizer_and_for_a_checkpoint_to_be_verified(tmp_path) -> None:
    argv = with_flags(SHORT, "--train-iters", "1", "--save", str(tmp_path))
    ended = launch(2, argv, fault="tokenizer:1:busy4", deadline=90)
    assert [rank.rc for rank in ended] == [0, 0], ended[0].err
    argv = with_flags(SHORT, "--train-iters", "1", "--load", str(tmp_path))
    ended = launch(2, argv, fault="load:1:busy4", deadline=90)
    assert [rank.rc for rank in ended] == [0, 0], ended[0].err
    assert "successfully loaded checkpoint" in ended[0].out


def test_verification_counts_as_work_and_says_how_far_it_is(tmp_path) -> None:
    content = {"weights-00000.safetensors": b"a" * 3_000_000, "weights-00001.safetensors": b"b"}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    files = {name: hash_file(tmp_path / name) for name in content}
    ticks: list[str] = []
    verified = patience.Verified(lambda: ticks.append(verified.how_far()))
    assert verified.how_far() == ""
    verify_files(tmp_path, Manifest(1, Progress(), {}, files, {}), seen=verified.seen)
    assert len(ticks) == 2 and ticks[-1] == ", 3 of 3 MB verified"


def test_a_rank_that_dies_at_it_is_named() -> None:
    ended = launch(2, SHORT, fault="data:0:sigkill", deadline=60)
    assert ended[1].rc == 6 and "rank 0" in ended[1].fatal


def test_the_one_that_works_says_so(monkeypatch) -> None:
    work = iter([0, 5])
    told_twice = threading.Event()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            told_twice.set()

    monkeypatch.setattr(patience, "TELL_SECONDS", 0.01)
    monkeypatch.setattr(patience, "work_of", lambda thread: next(work, 5))
    with patience.told("opening the data", say):
        assert told_twice.wait(20)
    assert "opening the data: 0 s so far, works in" in said[0]
    assert "stands still in" in said[1]
