"""Flat token files (one long row of uint16, the nanoGPT layout) as documents.

A document ends with its end-of-document token; what follows the last one is a document, too.
The bytes are those of a Megatron .bin, so that an .idx beside the file is all it needs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError
from megatron_lite.data.indexed_builder import IndexedDatasetBuilder, write_index
from megatron_lite.storage.disk import Disk

CHUNK = 1 << 24  # tokens looked at together
MOST = np.iinfo(np.int32).max


def read_flat(
    path: str | os.PathLike[str], dtype: npt.DTypeLike = np.uint16
) -> npt.NDArray[np.integer[Any]]:
    """The tokens, mapped; DataError if the size is no whole number of them."""
    kind = np.dtype(dtype).newbyteorder("<")
    try:
        size = Path(path).stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror} - give the .bin file") from error
    if size == 0 or size % kind.itemsize:
        raise DataError(
            f"{path} has {size} bytes, no whole number of {kind.itemsize}-byte tokens - is it a "
            "flat file of another --dtype, or cut off?"
        )
    return np.memmap(path, kind, "r")


def document_lengths(tokens: npt.NDArray[np.integer[Any]], eod: int) -> npt.NDArray[np.int64]:
    """Tokens of every document, each with its EOD."""
    ends = [
        np.flatnonzero(tokens[start : start + CHUNK] == eod) + (start + 1)
        for start in range(0, len(tokens), CHUNK)
    ]
    bounds = np.concatenate([np.zeros(1, np.int64), *ends]).astype(np.int64)
    if bounds[-1] != len(tokens):
        bounds = np.append(bounds, len(tokens))
    lengths = np.diff(bounds)
    if len(lengths) and lengths.max() > MOST:
        raise DataError(
            f"a document of {lengths.max()} tokens, at most {MOST} - is {eod} the right --eod?"
        )
    return lengths


def index_flat(
    path: str | os.PathLike[str],
    eod: int,
    *,
    dtype: npt.DTypeLike = np.uint16,
    disk: Disk | None = None,
) -> int:
    """Write the .idx that makes FILE.bin a pair where it lies; returns the documents."""
    place = Path(path)
    if place.suffix != ".bin":
        raise DataError(
            f"{path} must be named *.bin to be a pair - give --output-prefix to copy it"
        )
    lengths = document_lengths(read_flat(path, dtype), eod)
    bounds = np.arange(len(lengths) + 1, dtype=np.int64)
    disk = disk or Disk()
    disk.remove(place.with_suffix(".meta.json"))  # of a pair that was there before
    write_index(place.with_suffix(".idx"), dtype, lengths, bounds, disk)
    return len(lengths)


def convert_flat(
    path: str | os.PathLike[str],
    eod: int,
    prefix: str | os.PathLike[str],
    *,
    dtype: npt.DTypeLike = np.uint16,
    disk: Disk | None = None,
) -> int:
    """Copy a flat file to a pair of its own; returns the documents."""
    tokens = read_flat(path, dtype)
    lengths = document_lengths(tokens, eod)
    stops = np.cumsum(lengths)
    with IndexedDatasetBuilder(f"{os.fspath(prefix)}.bin", dtype, disk) as builder:
        first, begin = 0, 0
        while first < len(lengths):
            last = max(first + 1, int(np.searchsorted(stops, begin + CHUNK, side="right")))
            part = lengths[first:last]
            stop = int(stops[last - 1])
            builder.add_documents(tokens[begin:stop], part, np.ones(len(part), np.int64))
            first, begin = last, stop
        builder.finalize(f"{os.fspath(prefix)}.idx")
    return len(lengths)
