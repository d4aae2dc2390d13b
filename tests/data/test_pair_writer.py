"""A pair on the disk is what was handed over, whatever the sizes of the batches, or the run fails."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from megatron_lite.config.errors import StorageError
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.preparing import pair_writer
from megatron_lite.data.preparing.pair_writer import PairWriter, TokenBatch
from megatron_lite.data.provenance import KeyCounts
from megatron_lite.storage.disk import Disk, Operation

U16 = np.dtype(np.uint16)
LARGE = pair_writer.LARGE_BYTES // U16.itemsize
Result = TypeVar("_Result")


def batch(size: int, seed: int) -> TokenBatch:
    """One document of so many tokens, and an empty one."""
    tokens = np.random.default_rng(seed).integers(0, 50_000, size).astype(U16)
    lengths = np.array([size] if size else [], np.int32)
    return TokenBatch(tokens, lengths, np.array([len(lengths), 0], np.int64), num_eods=0)


class Spoiling(Disk):
    """Says that all is written, and changes the last write to a file of this suffix."""

    def __init__(self, suffix: str, spoil: Callable[[bytearray], None]) -> None:
        self.suffix, self.spoil = suffix, spoil

    def _operate(self, operation: Operation, action: Callable[[], Result]) -> Result:
        if operation.kind == "write" and operation.path.suffix == self.suffix:
            assert operation.data is not None and operation.append is not None
            spoilt = bytearray(operation.data)
            self.spoil(spoilt)
            return operation.append(memoryview(spoilt))  # type: ignore[return-value]
        return action()


@pytest.mark.parametrize(
    "sizes", [(5, 0, 7), (LARGE, 3, LARGE - 1, LARGE + 1, 0), (1, 3 * LARGE, 2)]
)
@pytest.mark.parametrize("stop_after", [None, 1])
def test_batches_of_all_sizes_are_in_order_and_hashed(
    tmp_path: Path, sizes: Sequence[int], stop_after: int | None
) -> None:
    batches = [batch(size, seed) for seed, size in enumerate(sizes)]
    writer = PairWriter(tmp_path, "0", U16, Disk())
    for number, one in enumerate(batches):
        writer.add(one)
        if number == stop_after:  # go on as --resume does
            counts = KeyCounts(**writer.mark())
            writer.add(batch(9, 99))
            writer.close()
            writer = PairWriter(tmp_path, "0", U16, Disk(), counts=counts)
    hashes = writer.prepare()
    assert (tmp_path / "0.bin").read_bytes() == b"".join(b.tokens.tobytes() for b in batches)
    for suffix in ("bin", "idx"):
        content = (tmp_path / f"0.{suffix}").read_bytes()
        assert hashes[suffix] == hashlib.sha256(content).hexdigest()
    assert IndexedDataset(tmp_path / "0").sequence_lengths.tolist() == [n for n in sizes if n]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("size", [40, LARGE])
def test_a_disk_that_keeps_something_else_is_found_before_anything_has_a_name(
    tmp_path: Path, suffix: str, size: int
) -> None:
    def flip(data: bytearray) -> None:
        data[len(data) // 2] ^= 1

    def swap(data: bytearray) -> None:
        data[:] = data[len(data) // 2 :] + data[: len(data) // 2]

    def lose(data: bytearray) -> None:
        del data[-1:]

    for spoil in (flip, swap, lose):
        folder = tmp_path / spoil.__name__
        folder.mkdir()
        writer = PairWriter(folder, "0", U16, Spoiling(suffix, spoil))
        writer.add(batch(size, seed=1))
        with pytest.raises(StorageError, match=rf"0\{suffix} reads back differently"):
            writer.prepare()
