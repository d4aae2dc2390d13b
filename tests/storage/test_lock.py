"""One run in a folder, however many starts, processes and namespaces want it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_lite.config.errors import StorageError
from megatron_lite.storage import lock as lock_file
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.faults import FaultyDisk
from megatron_lite.storage.lock import LOCK, FolderLock, FolderTaken, Owner
from tests.support.folders import renamed
from tests.support.places import ROOT
from tests.support.rights import needs_namespaces

HOLDER = """
import sys, time
from pathlib import Path
from megatron_lite.storage import lock
lock.RENEW_SECONDS = 0.05
held = lock.FolderLock.take(Path(sys.argv[1]), lock.Disk(), print)
print("held", flush=True)
while True:
    if sys.stdin.readline() == "check\\n":
        try:
            held.check()
            print("ours", flush=True)
        except lock.StorageError as error:
            print(type(error).__name__, error, flush=True)
"""
NAMESPACES = ["unshare", "--pid", "--fork", "--kill-child", "--uts", "--net", "--mount-proc"]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute in these tests is a third of a second."""
    monkeypatch.setattr(lock_file, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lock_file, "STALE_SECONDS", 0.3)


@contextmanager
def holder(folder: Path, *before: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder, started by the words before it."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def take(folder: Path, said: list[str] | None = None) -> FolderLock:
    return FolderLock.take(folder, Disk(), ([] if said is None else said).append, pause=0.02)


def test_a_folder_is_held_by_one_and_free_when_left(tmp_path: Path) -> None:
    first = take(tmp_path / "run")
    with pytest.raises(FolderTaken, match=f"in use by process {os.getpid()} on host .*, since 20"):
        take(tmp_path / "run")
    first.release()
    assert not (tmp_path / "run" / LOCK).exists()
    take(tmp_path / "run").release()
    with pytest.raises(StorageError, match="has left"):  # a writer that outlives its run
        first.check()


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path, reaped: bool) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(FolderTaken, match=f"process {process.pid} on"):
            take(tmp_path)
        process.send_signal(signal.SIGKILL)
        while not reaped and lock_file._start_of(str(process.pid))[1] != "Z":
            time.sleep(0.01)
        if reaped:
            process.wait()
        said: list[str] = []
        take(tmp_path, said).release()
        assert said == []


def test_another_process_of_the_same_number_is_not_the_owner(tmp_path: Path) -> None:
    owner = Owner.here(tmp_path)
    assert owner.fate(owner) == "alive"
    (tmp_path / LOCK).write_bytes(dataclasses.replace(owner, start="1").to_bytes(7))
    said: list[str] = []
    take(tmp_path, said).release()
    assert said == []


OTHERS = {"boot": "another", "namespaces": "pid:[1]/", "folder": "1:1", "start": ""}


@pytest.mark.parametrize("field", OTHERS)
def test_who_cannot_be_looked_up_is_watched_by_the_own_clock(tmp_path: Path, field: str) -> None:
    """Another machine or namespace, a copied folder; the clocks and names of hosts mean nothing."""
    there = Owner.here(tmp_path)
    there = dataclasses.replace(
        there, host="elsewhere", since="2099-01-01", **{field: OTHERS[field]}
    )
    (tmp_path / LOCK).write_bytes(there.to_bytes(7))
    os.utime(tmp_path / LOCK, (0, 0))
    said: list[str] = []
    began = time.monotonic()
    held = take(tmp_path, said)
    assert 0.3 <= time.monotonic() - began < 5.0
    assert (
        len(said) == 1 and "waiting for up to 0.3 s" in said[0] and "on host elsewhere" in said[0]
    )
    held.release()


def test_who_counts_on_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_file, "STALE_SECONDS", 20.0)
    there = dataclasses.replace(Owner.here(tmp_path), boot="another machine's")
    (tmp_path / LOCK).write_bytes(there.to_bytes(7))
    with ThreadPoolExecutor(1) as thread:
        start = thread.submit(take, tmp_path)
        time.sleep(0.3)
        (tmp_path / LOCK).write_bytes(there.to_bytes(8))
        with pytest.raises(FolderTaken, match="in use by"):
            start.result(10)
        start = thread.submit(take, tmp_path)
        time.sleep(0.3)
        (tmp_path / LOCK).unlink()  # it ended well
        start.result(10).release()


@pytest.mark.root
def test_a_start_in_other_namespaces_is_seen_to_live_and_to_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_namespaces(NAMESPACES)
    with holder(tmp_path, *NAMESPACES) as process:
        assert Owner.from_bytes((tmp_path / LOCK).read_bytes()).pid < 10
        said: list[str] = []
        with monkeypatch.context() as patient:
            patient.setattr(lock_file, "STALE_SECONDS", 20.0)
            with pytest.raises(FolderTaken, match="in use by"):
                take(tmp_path, said)
        assert len(said) == 1
        process.kill()
    take(tmp_path, said).release()
    assert len(said) == 2


@pytest.mark.ci
def test_a_process_that_was_stopped_too_long_finds_its_folder_taken(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        while lock_file._start_of(str(process.pid))[1] != "T":
            time.sleep(0.01)
        held = take(tmp_path)
        process.send_signal(signal.SIGCONT)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("check\n")
        process.stdin.flush()
        said = process.stdout.readline()
        assert said.startswith("FolderTaken --save") and f"process {os.getpid()} on" in said
        time.sleep(0.2)  # it does not renew in the new owner's file
        held.check()
        held.release()


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    for _ in range(10):
        (tmp_path / LOCK).write_bytes(
            dataclasses.replace(Owner.here(tmp_path), start="1").to_bytes(7)
        )

        def start(_: int) -> FolderLock | None:
            try:
                return take(tmp_path)
            except FolderTaken:
                return None

        with ThreadPoolExecutor(8) as threads:
            held = [found for found in threads.map(start, range(8)) if found is not None]
        assert len(held) == 1
        held[0].check()
        held[0].release()


def test_a_lock_that_was_renamed_by_mistake_is_put_back(tmp_path: Path) -> None:
    """Where flock does nothing: two starts judged the same lock, the other one was quicker."""
    held = take(tmp_path)
    held._remove(b"what had been judged")
    held.check()
    held.release()
    assert not list(tmp_path.iterdir())


def test_the_count_goes_on_in_place(tmp_path: Path) -> None:
    held = take(tmp_path)
    before = (tmp_path / LOCK).read_bytes()
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK).read_bytes() == before and time.monotonic() < deadline:
        time.sleep(0.02)
    after = (tmp_path / LOCK).read_bytes()
    assert after != before and len(after) == len(before)
    assert Owner.from_bytes(after) == held.owner
    held.release()


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def another_in_its_place(folder: Path) -> None:
    """As after `umount -l`: a folder is there, but not this one."""
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()


@pytest.mark.parametrize("befall", [renamed, removed, another_in_its_place])
def test_a_lost_folder_is_noticed_and_so_is_its_return(tmp_path: Path, befall) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "run"
    held = take(folder)
    held._ended.wait = lambda seconds: False  # type: ignore[method-assign]
    held.look()
    assert held.problem is None
    befall(folder)
    with pytest.raises(StorageError, match="renamed, removed or unmounted"):
        held.check()
    held.look()
    assert held.problem is not None and not isinstance(held.problem, FolderTaken)
    assert not (folder / LOCK).exists()
    if (tmp_path / "elsewhere").exists():
        if folder.exists():
            folder.rmdir()
        (tmp_path / "elsewhere").rename(folder)
        held.look()
        assert held.problem is None
    held.release()


def test_a_lock_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    held = take(tmp_path)
    (tmp_path / LOCK).unlink()
    held.check()
    assert Owner.from_bytes((tmp_path / LOCK).read_bytes()) == held.owner
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).write_bytes(dataclasses.replace(held.owner, token="another").to_bytes(1))
    with pytest.raises(FolderTaken, match="taken over by process"):
        held.check()
    held.release()
    assert (tmp_path / LOCK).exists()  # the other's


@pytest.mark.parametrize("content", [b"", b"[" * 9000, b'{"pid": "a"}'])
def test_what_is_no_lock_of_ours_is_watched_too(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    said: list[str] = []
    take(tmp_path, said).release()
    assert len(said) == 1 and "another run" in said[0]


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_what_is_no_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / LOCK
    {"fifo": lambda: os.mkfifo(path), "folder": path.mkdir, "link": lambda: path.symlink_to("x")}[
        kind
    ]()
    with pytest.raises(StorageError, match=str(path)):
        take(tmp_path)


def test_a_full_disk_leaves_no_lock(tmp_path: Path) -> None:
    disk = FaultyDisk(fail_at=0, error=28, kinds=("write",))
    with pytest.raises(StorageError, match="No space left"):
        FolderLock.take(tmp_path, disk, print)
    assert not list(tmp_path.iterdir())
