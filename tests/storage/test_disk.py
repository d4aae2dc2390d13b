"""Files are whole or absent, whatever operation fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.config.errors import StorageError
from megatron_lite.storage.disk import Disk, write_atomically
from megatron_lite.storage.faults import FaultyDisk, RecordingDisk, SimulatedCrash

ATOMIC_WRITE = ["create", "write", "fsync", "close", "rename", "sync_folder"]


def test_atomic_write_syncs_before_it_renames(tmp_path: Path) -> None:
    disk = RecordingDisk()
    write_atomically(tmp_path / "a", b"new", disk)
    assert [operation.kind for operation in disk.operations] == ATOMIC_WRITE
    assert disk.operations[4].target == tmp_path / "a"
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("fail_at", range(len(ATOMIC_WRITE)))
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("tear", [False, True])
def test_a_failing_write_leaves_old_or_new(
    tmp_path: Path, fail_at: int, error: int, tear: bool
) -> None:
    (tmp_path / "a").write_bytes(b"the old one")
    with pytest.raises(StorageError, match=os.strerror(error)):
        write_atomically(
            tmp_path / "a", b"new", FaultyDisk(fail_at=fail_at, error=error, tear=tear)
        )
    renamed = ATOMIC_WRITE[fail_at] == "sync_folder"
    assert (tmp_path / "a").read_bytes() == (b"new" if renamed else b"the old one")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("fail_at", range(len(ATOMIC_WRITE)))
def test_a_crash_leaves_old_or_new_under_the_name(tmp_path: Path, fail_at: int) -> None:
    (tmp_path / "a").write_bytes(b"the old one")
    disk = FaultyDisk(fail_at=fail_at, crash="raise", tear=True)
    with pytest.raises(SimulatedCrash):
        write_atomically(tmp_path / "a", b"new", disk)
    assert (tmp_path / "a").read_bytes() in (b"the old one", b"new")
    with pytest.raises(SimulatedCrash):  # dead is dead
        disk.remove(tmp_path / "a")


def test_a_kill_ends_the_process_at_the_operation(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from megatron_lite.storage.disk import write_atomically\n"
        "from megatron_lite.storage.faults import FaultyDisk\n"
        "write_atomically(Path(sys.argv[1]) / 'a', b'new', FaultyDisk(fail_at=4, crash='kill'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "a").exists()
    assert len(os.listdir(tmp_path)) == 1  # the temporary file, under a name nobody reads


def test_a_full_disk_stays_full_but_lets_one_remove(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"x")
    disk = FaultyDisk(fail_at=0, error=errno.ENOSPC, lasting=True)
    for name in "ab":
        with pytest.raises(StorageError, match=r"create failed.*bytes are free"):
            disk.create(tmp_path / name)
    disk.remove(tmp_path / "old")
    assert os.listdir(tmp_path) == []


def test_only_the_named_kinds_are_counted(tmp_path: Path) -> None:
    disk = FaultyDisk(fail_at=1, error=errno.EIO, kinds=("rename",))
    write_atomically(tmp_path / "a", b"1", disk)
    with pytest.raises(StorageError, match="rename failed"):
        write_atomically(tmp_path / "b", b"2", disk)
    assert os.listdir(tmp_path) == ["a"]


def test_create_refuses_what_exists_and_links(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("a", "link"):
        with pytest.raises(StorageError, match="remove it or choose another name"):
            Disk().create(tmp_path / name)
    assert not (tmp_path / "elsewhere").exists()


def test_errors_name_path_operation_and_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        Disk().make_folder(tmp_path / "file" / "folder")
    assert caught.value.exit_code == 5
    message = str(caught.value)
    assert "make_folder" in message and str(tmp_path / "file" / "folder") in message
    assert "choose another folder" in message


def test_written_bytes_and_size_are_those_of_the_buffer(tmp_path: Path) -> None:
    with Disk().create(tmp_path / "a") as file:
        file.write(b"")
        file.write(memoryview(b"abcdef")[2:4])
        file.write(bytearray(b"x" * 3))
        assert file.size == 5
    assert (tmp_path / "a").read_bytes() == b"cdxxx"


def test_removing_what_is_absent_is_fine_and_space_is_that_of_the_parent(tmp_path: Path) -> None:
    disk = Disk()
    disk.remove(tmp_path / "no")
    disk.remove_tree(tmp_path / "no")
    disk.make_folder(tmp_path / "a" / "b")
    disk.make_folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "c").write_bytes(b"x")
    disk.remove_tree(tmp_path / "a")
    assert os.listdir(tmp_path) == []
    assert disk.free_bytes(tmp_path / "not" / "yet") > 0
