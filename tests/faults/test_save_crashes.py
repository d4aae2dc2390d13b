"""A crash or a full disk at every file operation of a save: the old or the new checkpoint, whole."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.checkpoint.store import Saved, Store
from megatron_lite.config.errors import StorageError
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.faults import FaultyDisk, RecordingDisk, SimulatedCrash
from tests.faults.checkpoints import (
    CASES,
    NEW,
    OLD,
    loaded,
    save,
    save_beside,
    snapshot,
)

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    save(folder, OLD, 1, Disk())
    return folder


def at_every_operation(
    old: Path, tmp_path: Path, case: str, disk_at: Callable[[int], FaultyDisk],
    error: type[BaseException], save: Callable[..., Saved] = save,
) -> list[tuple[str, Path, int]]:  # fmt: skip
    """(operation, folder, seed that loads) for a save that fails at each of its operations."""
    iteration, keep_last = CASES[case]
    recorded = RecordingDisk()
    shutil.copytree(old, tmp_path / "recorded")
    save(tmp_path / "recorded", NEW, iteration, recorded, keep_last)
    assert len(recorded.operations) > 25
    found = []
    for k, operation in enumerate(recorded.operations):
        folder = tmp_path / str(k)
        shutil.copytree(old, folder)
        retention = ".removed.partial" in f"{operation.path} {operation.target}"
        if error is StorageError and retention:  # the save is complete: a warning, no failure
            assert save(folder, NEW, iteration, disk_at(k), keep_last).warnings
        else:
            with pytest.raises(error):
                save(folder, NEW, iteration, disk_at(k), keep_last)
        found.append((operation.kind, folder, loaded(folder)))
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tear", [False, True], ids=["", "torn"])
@pytest.mark.parametrize("way", [save, save_beside])
def test_after_a_crash_the_old_or_the_new_checkpoint_loads(old, tmp_path, case, tear, way) -> None:
    found = at_every_operation(
        old, tmp_path, case, lambda k: FaultyDisk(fail_at=k, crash="raise", tear=tear),
        SimulatedCrash, way,
    )  # fmt: skip
    seeds = [seed for _, _, seed in found]
    assert seeds == sorted(seeds) and set(seeds) == {OLD, NEW}  # once new, never old again
    for _, folder, seed in found:
        store = Store(folder, ParallelContext.serial())
        store.prepare(snapshot(store, 3, 3))
        assert not list(folder.glob(".*")), "the next start clears away what the crash left"
        assert loaded(folder) == seed
        save(folder, 3, 3, Disk())
        assert loaded(folder) == 3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("way", [save, save_beside])
def test_a_disk_that_fails_is_a_storage_error_and_the_old_one_stays(
    old, tmp_path, case, number, way
) -> None:
    found = at_every_operation(
        old, tmp_path, case,
        lambda k: FaultyDisk(fail_at=k, error=number, tear=True, lasting=number == errno.ENOSPC),
        StorageError, way,
    )  # fmt: skip
    seeds = [seed for _, _, seed in found]
    assert seeds == sorted(seeds) and seeds[0] == OLD
    for kind, folder, seed in found:
        left = [path.name for path in folder.glob(".*")]
        assert left == [] or kind.startswith("remove"), (kind, seed, left)


def test_every_file_is_on_the_device_before_the_rename_that_shows_it(old, tmp_path) -> None:
    """What a power cut may lose is then never visible: writes before the fsync of their file only."""
    disk = RecordingDisk()
    save(tmp_path, NEW, 2, disk)
    kinds = [(o.kind, o.path.name) for o in disk.operations]
    shown = next(i for i, o in enumerate(disk.operations) if o.kind == "rename")
    removed = {name for kind, name in kinds if kind == "remove"}
    for name in {name for kind, name in kinds[:shown] if kind == "create"} - removed:
        last_write = max(i for i, k in enumerate(kinds) if k == ("write", name))
        assert ("fsync", name) in kinds[last_write:shown], name
    assert ("sync_folder", disk.operations[shown].path.name) in kinds[:shown]
    assert ("sync_folder", "tokenizer") in kinds[:shown] and ("fsync", "vocab.json") in kinds[
        :shown
    ]
    listing = kinds.index(("create", "part-00000.json"))
    assert ("fsync", "part-00000.json") in kinds[
        listing : kinds.index(("remove", "part-00000.json"))
    ]
    pointer = max(i for i, o in enumerate(disk.operations) if o.kind == "rename")
    assert ("sync_folder", tmp_path.name) in kinds[shown:pointer]
