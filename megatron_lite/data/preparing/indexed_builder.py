"""Writes Megatron's `.bin`/`.idx` pairs (data/indexed.py), whole or not at all."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError, StorageError
from megatron_lite.data.indexed import (
    CODES,
    HEADER,
    MAGIC,
    VERSION,
    IndexedDataset,
    TokenArray,
    bin_path,
    idx_path,
)
from megatron_lite.storage.disk import Disk, temporary_name

_WRITE_BYTES = 4 << 20  # small documents are gathered into writes of this size


def write_index(
    path: Path, dtype: npt.DTypeLike, lengths: npt.ArrayLike, bounds: npt.ArrayLike, disk: Disk
) -> None:
    """Write the .idx of a .bin that is already there; whole or not at all.

    lengths: tokens of every sequence; bounds: sequences before every document and after the last.
    """
    temporary = temporary_name(path)
    try:
        _write_index(temporary, np.dtype(dtype), np.asarray(lengths), np.asarray(bounds), disk)
        disk.rename(temporary, path)
    finally:
        with contextlib.suppress(StorageError):
            disk.remove(temporary)
    disk.sync_folder(path.parent)


def _write_index(
    path: Path, dtype: np.dtype[Any], lengths: TokenArray, bounds: TokenArray, disk: Disk
) -> None:
    with disk.create(path) as file:
        file.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], len(lengths), len(bounds)))
        file.write(lengths.astype("<i4", copy=False).tobytes())
        nbytes = lengths.astype("<i8") * dtype.itemsize
        file.write((np.cumsum(nbytes) - nbytes).astype("<i8", copy=False).tobytes())
        file.write(bounds.astype("<i8", copy=False).tobytes())
        file.fsync()


class IndexedDatasetBuilder:
    """Writes a `.bin`/`.idx` pair whose names appear only when both files are complete.

    with IndexedDatasetBuilder("docs_text_document.bin", dtype=np.uint16) as builder:
        builder.add_document(tokens, [len(tokens)])
        builder.finalize("docs_text_document.idx")

    Leaving the block without `finalize` leaves nothing behind.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dtype: npt.DTypeLike = np.int32,
        disk: Disk | None = None,
    ) -> None:
        self.path = Path(path)
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            names = ", ".join(sorted(str(known) for known in CODES))
            raise DataError(f"{self.path}: {self.dtype} is no token type; choose from {names}")
        self._disk = Disk() if disk is None else disk
        self._lengths = array("i")
        self._bounds = array("q", [0])
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._unfinished = [temporary_name(self.path)]
        self._file = self._disk.create(self._unfinished[0])

    def add_item(self, tokens: npt.ArrayLike) -> None:
        """Append one sequence to the current document; end_document closes it."""
        sequence = np.asarray(tokens)
        self._append_tokens(sequence)
        self._append_lengths(np.array([sequence.size]))

    def end_document(self) -> None:
        """The document ends here; without sequences since the last end it is an empty one."""
        self._bounds.append(len(self._lengths))

    def add_document(self, tokens: npt.ArrayLike, lengths: Sequence[int] | npt.ArrayLike) -> None:
        """Append one document: its tokens and the lengths of its sequences."""
        self.add_documents(tokens, lengths, [np.size(np.asarray(lengths))])

    def add_documents(
        self, tokens: npt.ArrayLike, lengths: npt.ArrayLike, sequences: npt.ArrayLike
    ) -> None:
        """Append many documents: all their tokens, all lengths, the sequences of each document."""
        flat, sizes = np.asarray(tokens), np.asarray(lengths, dtype=np.int64).reshape(-1)
        counts = np.asarray(sequences, dtype=np.int64).reshape(-1)
        if sizes.sum() != flat.size or counts.sum() != sizes.size:
            raise DataError(
                f"{self.path}: {flat.size} tokens in sequences of {sizes.sum()} in all, "
                f"{sizes.size} sequences in documents of {counts.sum()} in all; "
                "the end-of-document token counts, too"
            )
        self._append_tokens(flat)
        before = len(self._lengths)
        self._append_lengths(sizes)
        self._bounds.frombytes((before + np.cumsum(counts)).astype(np.int64).tobytes())

    def add_index(self, prefix: str | os.PathLike[str]) -> None:
        """Append all documents of another pair of the same dtype."""
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise DataError(
                f"{idx_path(prefix)} holds {other.dtype}, but {self.path} is written as "
                f"{self.dtype} - preprocess both with the same vocabulary"
            )
        before = len(self._lengths)
        with open(bin_path(prefix), "rb") as file:
            while chunk := file.read(4 * _WRITE_BYTES):
                self._append_bytes(chunk)
        self._append_lengths(other.sequence_lengths)
        self._bounds.frombytes((other.document_indices[1:] + before).tobytes())

    add_doc = add_document
    merge_file_ = add_index

    def finalize(self, path: str | os.PathLike[str] | None = None) -> None:
        """Write the index (beside the .bin by default) and give both files their names."""
        self.prepare()
        self.publish(path)

    def prepare(self) -> None:
        """Complete both files under their temporary names, checked and on the device."""
        if self._bounds[-1] != len(self._lengths):
            raise DataError(f"{self.path}: sequences after the last end_document()")
        self._flush()
        self._file.fsync()
        self._file.close()
        lengths = np.frombuffer(self._lengths, np.int32)
        expected = int(lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        actual = self._unfinished[0].stat().st_size
        if actual != expected:
            raise DataError(
                f"{self.path}: {actual} bytes were written, expected {expected} by the lengths"
            )
        self._unfinished.append(temporary_name(self.path.with_suffix(".idx")))
        bounds = np.frombuffer(self._bounds, np.int64)
        _write_index(self._unfinished[1], self.dtype, lengths, bounds, self._disk)

    def publish(self, path: str | os.PathLike[str] | None = None) -> None:
        """Give the prepared files their names; the index, last, says that both are whole."""
        index = self.path.with_suffix(".idx") if path is None else Path(path)
        disk = self._disk
        # an old .idx or .meta.json must never stand beside a new .bin
        disk.remove(index)
        disk.remove(self.path.with_suffix(".meta.json"))
        disk.sync_folder(index.parent)
        disk.rename(self._unfinished[0], self.path)
        self._unfinished[0] = self.path  # without its index it is removed again
        disk.sync_folder(self.path.parent)
        disk.rename(self._unfinished[1], index)
        self._unfinished.clear()
        disk.sync_folder(index.parent)

    def abort(self) -> None:
        """Remove what was written so far; after finalize it does nothing."""
        with contextlib.suppress(StorageError):
            self._file.close()
        while self._unfinished:
            with contextlib.suppress(StorageError):
                self._disk.remove(self._unfinished.pop())

    def __enter__(self) -> IndexedDatasetBuilder:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _append_tokens(self, tokens: TokenArray) -> None:
        if tokens.size == 0:
            return
        if tokens.dtype.kind not in "iu":
            raise DataError(f"{self.path}: tokens are integers, not {tokens.dtype}")
        if tokens.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            low, high = int(tokens.min()), int(tokens.max())
            if low < limits.min or high > limits.max:
                wrong = low if low < limits.min else high
                raise DataError(
                    f"{self.path}: token id {wrong} does not fit {self.dtype} "
                    f"({limits.min} to {limits.max}) - was it made with another vocabulary?"
                )
        self._append_bytes(tokens.astype(self.dtype.newbyteorder("<"), copy=False).tobytes())

    def _append_bytes(self, data: bytes) -> None:
        self._pending.append(data)
        self._pending_bytes += len(data)
        if self._pending_bytes >= _WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._file.write(b"".join(self._pending))
        self._pending.clear()
        self._pending_bytes = 0

    def _append_lengths(self, lengths: TokenArray) -> None:
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise DataError(f"{self.path}: a sequence of {lengths.max()} tokens; at most 2^31 - 1")
        if lengths.size and lengths.min() < 0:
            raise DataError(f"{self.path}: a sequence of {lengths.min()} tokens")
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
