"""The cache gives what building gives, never something old or half-written."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.config.errors import StorageError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.build import build_datasets
from megatron_lite.data.cache import Kept, build_or_load
from megatron_lite.data.digest import _BLOCK, digest_of
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.faults import FaultyDisk, RecordingDisk, SimulatedCrash
from tests.data.conftest import WriteDocuments

ARRAYS = {
    "rows": np.arange(12, dtype=np.int64).reshape(6, 2),
    "none": np.empty(0, np.int16),
    "order": np.arange(5, dtype=np.uint32),
}


def arrays() -> Any:
    return ARRAYS.items()


def never() -> Any:
    raise AssertionError("was in the cache")


def assert_same(kept: Kept) -> None:
    found = kept.arrays
    assert kept.digest == build_or_load(None, {}, arrays, Disk()).digest
    assert set(found) == set(ARRAYS)
    for name, values in ARRAYS.items():
        assert np.array_equal(found[name], values) and found[name].dtype == values.dtype


def test_a_second_call_maps_what_the_first_built(tmp_path: Path) -> None:
    assert_same(build_or_load(tmp_path / "c", {"a": 1}, arrays, Disk()))
    found = build_or_load(tmp_path / "c", {"a": 1}, never, Disk())
    assert_same(found)
    assert not found.arrays["rows"].flags.writeable and not found.arrays["rows"].flags.owndata
    assert all(values.ctypes.data % 64 == 0 for values in found.arrays.values() if values.size)
    with pytest.raises(AssertionError, match="was in the cache"):
        build_or_load(tmp_path / "c", {"a": 2}, never, Disk())
    assert_same(build_or_load(None, {"a": 1}, arrays, Disk()))


def test_any_changed_bit_type_or_order_changes_the_digest() -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 1 << 62, 70_000)  # more than a block
    digest = digest_of(values)
    for at in (0, 1, _BLOCK - 1, _BLOCK, 69_999):
        other = values.copy()
        other[at] ^= 1 << int(random.integers(63))
        assert digest_of(other) != digest
    swapped = values.copy()
    swapped[[3, _BLOCK + 3]] = swapped[[_BLOCK + 3, 3]]  # the same place of two blocks
    assert digest_of(swapped) != digest
    assert digest_of(values.view(np.uint64)) != digest
    assert digest_of(values.reshape(2, -1)) != digest
    assert digest_of(np.arange(3, dtype=np.int16)) != digest_of(np.arange(4, dtype=np.int16))
    assert digest_of(values, before=1) != digest


@pytest.mark.parametrize("damage", ["truncate", "empty", "json", "remove", "offset"])
def test_a_broken_cache_is_built_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    build_or_load(tmp_path, {}, arrays, Disk())
    (path,), (key,) = tmp_path.glob("*.arrays"), tmp_path.glob("*.json")
    if damage == "truncate":
        os.truncate(path, path.stat().st_size - 8)
    elif damage == "empty":
        os.truncate(path, 0)
    elif damage == "json":
        key.write_text("[1")
    elif damage == "remove":
        path.unlink()
    else:
        key.write_text(key.read_text().replace('"offset": 0', '"offset": 999'))
    with caplog.at_level(logging.WARNING):
        assert_same(build_or_load(tmp_path, {}, arrays, Disk()))
    assert_same(build_or_load(tmp_path, {}, never, Disk()))
    assert damage == "remove" or "building it anew" in caplog.text


def test_a_fault_at_any_operation_leaves_a_cache_that_works(tmp_path: Path) -> None:
    recorded = RecordingDisk()
    build_or_load(tmp_path / "all", {}, arrays, recorded)
    for k in range(len(recorded.operations)):
        crashing = FaultyDisk(fail_at=k, crash="raise", tear=True)
        with pytest.raises(SimulatedCrash):
            build_or_load(tmp_path / f"c{k}", {}, arrays, crashing)
        assert_same(build_or_load(tmp_path / f"c{k}", {}, arrays, Disk()))
    with pytest.raises(StorageError, match="No space left"):
        full = FaultyDisk(fail_at=3, error=errno.ENOSPC)
        build_or_load(tmp_path / "full", {}, arrays, full)
    assert not [name for name in os.listdir(tmp_path / "full") if "partial" in name]


def test_data_that_changed_is_not_read_through_an_old_index(
    write_documents: WriteDocuments,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def read() -> list[int]:
        datasets = build_datasets(
            DataConfig(data_path=[str(tmp_path / "a")], split="1"),
            seq_length=8,
            seed=1,
            train_samples=20,
            valid_samples=0,
            test_samples=0,
            vocab_size=100,
            eod=99,
            cache_folder=tmp_path / "cache",
        )
        assert datasets.train is not None
        return [int(token) for i in range(20) for token in datasets.train[i].tokens]

    write_documents("a", 30, seed=1)
    first = read()
    files = sorted(os.listdir(tmp_path / "cache"))
    assert read() == first and sorted(os.listdir(tmp_path / "cache")) == files
    write_documents("a", 40, seed=2)
    second = read()
    assert second != first and len(os.listdir(tmp_path / "cache")) == 2 * len(files)
    assert "the data changed since its index was built" in caplog.text


@pytest.mark.parametrize("what", ["zeros", "pipe", "folder", "terabyte", "device"])
@pytest.mark.parametrize("suffix", [".json", ".arrays"])
def test_a_cache_that_holds_something_else_is_built_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, what: str
) -> None:
    """Without --verify-data, at once, and mended for the next start."""
    build_or_load(tmp_path, {}, arrays, Disk())
    (path,) = tmp_path.glob(f"*{suffix}")
    size = path.stat().st_size
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        (path / "inside").mkdir(parents=True)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(size if what == "zeros" else 1 << 40)
    assert_same(build_or_load(tmp_path, {}, arrays, Disk()))
    assert "building it anew" in caplog.text
    caplog.clear()
    assert_same(build_or_load(tmp_path, {}, arrays, Disk()))
    assert "building it anew" not in caplog.text


def test_another_split_is_no_other_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for documents in (8, 6):
        data = {"files": [{"source": "the same", "documents": [0, documents]}]}
        build_or_load(tmp_path, {"names": ["a"]}, lambda: [], Disk(), data=data)
    assert not caplog.records
    build_or_load(tmp_path, {"names": ["a"]}, lambda: [], Disk(),
                  data={"files": [{"source": "another", "documents": [0, 6]}]})  # fmt: skip
    assert "the data changed since its index was built" in caplog.text
