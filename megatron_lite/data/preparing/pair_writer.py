"""Writes a `.bin`/`.idx` pair that a killed run can resume; memory does not grow with it.

<folder>/0.bin  0.lengths  0.bounds      appended to, cut back to the last mark on --resume
<folder>/0.idx                           made from the last two at the end
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError, StorageError
from megatron_lite.data.indexed import CODES, HEADER, MAGIC, VERSION, IndexedDataset
from megatron_lite.data.provenance import KeyCounts
from megatron_lite.storage.disk import Bytes, Disk, DiskFile

_WRITE_BYTES = 4 << 20  # small batches are gathered into writes of this size
LARGE_BYTES = 1 << 18  # what is no smaller is written as it is: gathering would copy it
_BLOCK = 1 << 20  # lengths turned into pointers at a time
READ_BYTES = 1 << 18  # read back at a time: stays in the processor's cache


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The documents of a batch for one key: tokens, sequence lengths, sequences per document."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    sequences: npt.NDArray[np.int64]
    num_eods: int


class Content:
    """What was written to a file: sha256, which is recorded, and crc32, by which it is read back.

    The crc takes an eighth of the time, and misses one spoilt file in four billion.
    """

    def __init__(self) -> None:
        self._sha, self.crc = hashlib.sha256(), 0

    def update(self, data: Bytes) -> None:
        """The next bytes."""
        self._sha.update(data)
        self.crc = zlib.crc32(data, self.crc)

    def sha256(self) -> str:
        """Of everything so far."""
        return self._sha.hexdigest()


class Appender:
    """A file that is appended to in large writes."""

    def __init__(self, path: Path, disk: Disk, size: int | None) -> None:
        """size: continue after so many bytes of the file; None: make it."""
        self._file: DiskFile = disk.create(path) if size is None else disk.reopen(path, size)
        self._pending: list[Bytes] = []
        self._pending_bytes = 0

    def append(self, data: Bytes) -> None:
        """Append; the bytes, which must not change any more, reach the system in large pieces."""
        if len(data) >= LARGE_BYTES:
            self.flush()
            self._file.write(data)
            return
        self._pending.append(data)
        self._pending_bytes += len(data)
        if self._pending_bytes >= _WRITE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand all bytes to the system."""
        self._file.write(b"".join(self._pending))
        self._pending.clear()
        self._pending_bytes = 0

    def sync(self) -> None:
        """Return only when all bytes are on the device."""
        self.flush()
        self._file.fsync()

    def close(self) -> None:
        """Close without flushing."""
        self._file.close()


class PairWriter:
    """The pair of one key, in a folder of its own until it is complete."""

    def __init__(
        self,
        folder: Path,
        name: str,
        dtype: np.dtype[Any],
        disk: Disk,
        *,
        counts: KeyCounts | None = None,
        complete: bool = False,
    ) -> None:
        """counts: of a run to be continued; what was written after them is cut off.

        complete: both files are finished, only their names are missing.
        """
        self.dtype = dtype
        self.counts = counts or KeyCounts()
        self.bin, self.idx = folder / f"{name}.bin", folder / f"{name}.idx"
        self.meta = folder / f"{name}.meta.json"
        self._lengths, self._bounds = folder / f"{name}.lengths", folder / f"{name}.bounds"
        self._disk = disk
        self._content = Content()
        self._files: list[Appender] = []
        if complete:
            return
        sizes: list[int | None] = [None] * 3
        if counts is not None:
            sizes = [
                counts.tokens * dtype.itemsize,
                counts.sequences * 4,
                counts.documents * 8,
            ]
            disk.remove(self.idx)
            for piece in _pieces(self.bin, sizes[0]):
                self._content.update(piece)
        paths = (self.bin, self._lengths, self._bounds)
        self._files = [Appender(p, disk, s) for p, s in zip(paths, sizes, strict=True)]

    def add(self, batch: TokenBatch) -> None:
        """Append a batch; its tokens have the file's dtype."""
        assert batch.tokens.dtype == self.dtype, f"{batch.tokens.dtype} is not {self.dtype}"
        counts = self.counts
        bounds = counts.sequences + np.cumsum(batch.sequences, dtype=np.int64)
        tokens = bytes_of(batch.tokens.astype(self.dtype.newbyteorder("<"), copy=False))
        self._content.update(tokens)
        self._files[0].append(tokens)
        self._files[1].append(batch.lengths.astype("<i4", copy=False).tobytes())
        self._files[2].append(bounds.astype("<i8", copy=False).tobytes())
        counts.documents += len(batch.sequences)
        counts.empty += int(np.count_nonzero(batch.sequences == 0))
        counts.sequences += len(batch.lengths)
        counts.tokens += len(batch.tokens)
        counts.eods += batch.num_eods

    def mark(self) -> dict[str, int]:
        """Everything so far is on the device; its counts, from which a run can resume."""
        for file in self._files:
            file.sync()
        return asdict(self.counts)

    def prepare(self) -> dict[str, str]:
        """Complete both files, read them back and return their sha256 by suffix."""
        self.mark()
        self.close()
        counts = self.counts
        lengths = np.memmap(self._lengths, "<i4", "r") if counts.sequences else np.empty(0, "<i4")
        total = int(lengths.sum(dtype=np.int64))
        if total != counts.tokens:
            raise DataError(f"{self.bin}: {counts.tokens} tokens, {total} by the lengths")
        content = Content()
        with self._disk.create(self.idx) as file:
            header = (MAGIC, VERSION, CODES[self.dtype], counts.sequences, counts.documents + 1)
            _write(file, content, HEADER.pack(*header))
            for begin in range(0, len(lengths), _BLOCK):
                _write(file, content, lengths[begin : begin + _BLOCK].tobytes())
            offset = 0
            for begin in range(0, len(lengths), _BLOCK):
                sizes = lengths[begin : begin + _BLOCK].astype("<i8") * self.dtype.itemsize
                _write(file, content, (offset + np.cumsum(sizes) - sizes).astype("<i8").tobytes())
                offset += int(sizes.sum())
            _write(file, content, bytes(8))  # the first document begins at sequence 0
            with open(self._bounds, "rb") as bounds:
                while data := bounds.read(8 * _BLOCK):
                    _write(file, content, data)
            file.fsync()
        return {
            "bin": _verified(self.bin, self._content),
            "idx": _verified(self.idx, content),
        }

    def write_facts(self, content: bytes) -> None:
        """What is known about the pair, for `.meta.json`."""
        self._disk.remove(self.meta)
        with self._disk.create(self.meta) as file:
            file.write(content)
            file.fsync()

    def publish(self, prefix: str) -> None:
        """Give the files their names; the index, last, says that all are whole.

        Resumes where a killed run left off.
        """
        disk = self._disk
        bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        if self.bin.exists():
            # an old .idx must never stand beside a new .bin
            disk.remove(idx_path)
            disk.sync_folder(idx_path.parent)
            disk.rename(self.bin, bin_path)
        if self.meta.exists():
            disk.rename(self.meta, f"{prefix}.meta.json")
        disk.sync_folder(bin_path.parent)
        if self.idx.exists():
            disk.rename(self.idx, idx_path)
            disk.sync_folder(idx_path.parent)

    def withdraw(self, prefix: str) -> None:
        """After a failure between the two renames: no .bin without its .idx."""
        if self.idx.exists() and not self.bin.exists():
            self._disk.remove(f"{prefix}.bin")
            self._disk.remove(f"{prefix}.meta.json")

    def close(self) -> None:
        """Close the files as they are."""
        for file in self._files:
            file.close()


def bytes_of(values: npt.NDArray[Any]) -> memoryview:
    """The array's own memory, without a copy where it is contiguous."""
    return np.ascontiguousarray(values).data.cast("B") if len(values) else memoryview(b"")


def _write(file: DiskFile, content: Content, data: bytes) -> None:
    file.write(data)
    content.update(data)


def _pieces(path: Path, size: int | None) -> Iterator[memoryview]:
    """The first `size` bytes of a file (None: all), each piece in the memory of the one before."""
    piece = memoryview(bytearray(READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while size is None or size > 0:
            count = file.readinto(piece[: min(size or READ_BYTES, READ_BYTES)])
            if not count:
                return
            yield piece[:count]
            size = None if size is None else size - count


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    for piece in _pieces(path, None):
        digest.update(piece)
    return digest.hexdigest()


def _verified(path: Path, written: Content) -> str:
    """sha256 of what was written; StorageError where the disk holds something else."""
    crc = 0
    for piece in _pieces(path, None):
        crc = zlib.crc32(piece, crc)
    if crc != written.crc:
        raise StorageError(
            f"{path} reads back differently from what was written - the disk or its memory is "
            "broken; write to another one"
        )
    return written.sha256()


def verify_written(prefix: str, counts: KeyCounts) -> None:
    """Open what was written as a trainer would: a count that differs is the disk's doing."""
    written = IndexedDataset(prefix)
    tokens = int(written.sequence_lengths.sum(dtype=np.int64))
    found = [len(written.document_indices) - 1, len(written), tokens]
    expected = [counts.documents, counts.sequences, counts.tokens]
    if found != expected:
        raise StorageError(
            f"{prefix}: wrote {expected} documents, sequences and tokens, read back "
            f"{found} - the disk does not keep what is written"
        )
