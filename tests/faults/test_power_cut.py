"""Power cuts at every operation of a save, a preprocessing, an index cache: old, new, or built anew."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest

from megatron_lite.checkpoint.store import POINTER
from megatron_lite.data.cache import build_or_load
from megatron_lite.storage.disk import Disk, write_atomically
from megatron_lite.storage.faults import RecordingDisk, SimulatedCrash
from tests.faults.checkpoints import CASES, NEW, OLD, loaded, save
from tests.faults.kept import arrays
from tests.support.power import PowerCutDisk
from tests.support.preprocess import attempt, hashes, numbers

pytestmark = pytest.mark.usefixtures("no_fsync")
SEEDS = range(3)
"""Each operation is cut so often, each time with another loss."""


def attic(folder: Path) -> Path:
    path = folder.with_name(folder.name + "-attic")
    path.mkdir()
    return path


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c == "keep last" else pytest.mark.ci) for c in CASES]
)
def test_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path, case) -> None:
    iteration, keep_last = CASES[case]
    save(tmp_path / "old", OLD, 1, Disk())
    recorded = RecordingDisk()
    shutil.copytree(tmp_path / "old", tmp_path / "recorded")
    save(tmp_path / "recorded", NEW, iteration, recorded, keep_last)
    found = set()
    for k in range(len(recorded.operations) + 1):
        for seed in SEEDS:
            folder = tmp_path / f"{k}-{seed}"
            shutil.copytree(tmp_path / "old", folder)
            disk = PowerCutDisk(fail_at=k, attic=attic(folder))
            done = k == len(recorded.operations)
            with contextlib.nullcontext() if done else pytest.raises(SimulatedCrash):
                save(folder, NEW, iteration, disk, keep_last)
            disk.cut(Random(k * 100 + seed))
            found.add(loaded(folder))
            assert not done or loaded(folder) == NEW, "a save that returned is not lost"
            save(folder, 3, 3, Disk())
            assert loaded(folder) == 3
    assert found == {OLD, NEW}


def test_the_simulation_loses_what_was_not_synced(tmp_path) -> None:
    """A pointer written without fsync, as peers do, is torn or empty under some seed; ours never."""
    outcomes = set()
    for seed in range(40):
        for careful in (False, True):
            folder = tmp_path / f"{seed}-{careful}"
            folder.mkdir()
            write_atomically(folder / POINTER, b"1111111\n", Disk())
            disk = PowerCutDisk(fail_at=99, attic=attic(folder))
            if careful:
                write_atomically(folder / POINTER, b"2222222\n", disk)
            else:
                with disk.create(folder / "aside") as file:
                    file.write(b"2222222\n")
                disk.rename(folder / "aside", folder / POINTER)
            disk.cut(Random(seed))
            outcomes.add((careful, (folder / POINTER).read_bytes()))
    careless = {data for careful, data in outcomes if not careful}
    assert {data for careful, data in outcomes if careful} == {b"2222222\n"}
    assert {b"1111111\n", b"2222222\n", b""} < careless


def test_a_preprocessing_leaves_nothing_or_whole_pairs_and_is_resumed(tmp_path) -> None:
    source = numbers(tmp_path / "a.jsonl", 4)

    recorded = RecordingDisk()
    attempt(source, tmp_path / "whole", recorded, resume=False)
    expected = hashes(tmp_path / "whole")
    for k in range(len(recorded.operations)):
        folder = tmp_path / str(k)
        disk = PowerCutDisk(fail_at=k, attic=attic(folder))
        with pytest.raises(SimulatedCrash):
            attempt(source, folder, disk, resume=False)
        disk.cut(Random(k))
        pairs = [p.name for p in folder.glob("x_*.idx")] if folder.exists() else []
        left = hashes(folder)
        assert all(left[n] == expected[n] for idx in pairs for n in (idx, idx[:-3] + "bin")), k
        attempt(source, folder, Disk(), resume=True)
        assert hashes(folder) == expected, k
        assert not [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.mark.parametrize("before", [False, True], ids=["fresh", "beside another"])
def test_an_index_cache_is_found_whole_or_built_anew(tmp_path, before) -> None:
    def build(folder: Path, disk: Disk) -> None:
        kept = build_or_load(folder, {"seed": 1}, arrays, disk, verify=True)
        for name, values in arrays():
            assert np.array_equal(kept.arrays[name], values)

    recorded = RecordingDisk()
    build(tmp_path / "whole", recorded)
    for k in range(len(recorded.operations)):
        for seed in SEEDS:
            folder = tmp_path / f"{k}-{seed}"
            if before:
                build_or_load(folder, {"seed": 2}, arrays, Disk())
            disk = PowerCutDisk(fail_at=k, attic=attic(folder))
            with pytest.raises(SimulatedCrash):
                build(folder, disk)
            disk.cut(Random(seed))
            kept = build_or_load(
                folder, {"seed": 1}, arrays, Disk()
            )  # without asking for the digest
            for name, values in arrays():
                assert np.array_equal(kept.arrays[name], values)
