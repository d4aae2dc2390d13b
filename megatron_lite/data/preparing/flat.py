"""Flat token files (one long row of uint16, the nanoGPT layout) as documents.

A document ends with its end-of-document token; what follows the last one is a document, too.
The bytes are those of a Megatron .bin, so that an .idx beside the file is all it needs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError
from megatron_lite.data.preparing.flat_header import Header, header_of
from megatron_lite.data.preparing.indexed_builder import IndexedDatasetBuilder, write_index
from megatron_lite.storage.disk import Disk

_CHUNK = 1 << 24  # tokens looked at together
_MOST = np.iinfo(np.int32).max


class Flat(NamedTuple):
    """The tokens of a flat file, mapped, and what stood before them."""

    tokens: npt.NDArray[np.integer[Any]]
    header: Header | None


def read_flat(path: str | os.PathLike[str], dtype: npt.DTypeLike | None = None) -> Flat:
    """Of dtype, uint16 by default, or of what a header says.

    DataError if the size is no whole number of tokens, or the file is one of another kind.
    """
    try:
        size = Path(path).stat().st_size
        header = header_of(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror} - give the .bin file") from error
    if header is not None:
        kind = header.dtype
        if dtype is not None and np.dtype(dtype).itemsize != kind.itemsize:
            raise DataError(f"{path}: {header.name} says {kind}, --dtype says {np.dtype(dtype)}")
        # a pair has no unsigned 32 bits; no vocabulary reaches the last of them
        signed = kind if kind.itemsize == 2 else np.dtype("<i4")
        return Flat(np.memmap(path, signed, "r", offset=header.bytes), header)
    kind = np.dtype(dtype or np.uint16).newbyteorder("<")
    if size == 0 or size % kind.itemsize:
        raise DataError(
            f"{path} has {size} bytes, no whole number of {kind.itemsize}-byte tokens - is it a "
            "flat file of another --dtype, or cut off?"
        )
    return Flat(np.memmap(path, kind, "r"), None)


def document_lengths(tokens: npt.NDArray[np.integer[Any]], eod: int) -> npt.NDArray[np.int64]:
    """Tokens of every document, each with its EOD."""
    ends = [
        np.flatnonzero(tokens[start : start + _CHUNK] == eod) + (start + 1)
        for start in range(0, len(tokens), _CHUNK)
    ]
    bounds = np.concatenate([np.zeros(1, np.int64), *ends]).astype(np.int64)
    if bounds[-1] != len(tokens):
        bounds = np.append(bounds, len(tokens))
    lengths = np.diff(bounds)
    if len(lengths) and lengths.max() > _MOST:
        raise DataError(
            f"a document of {lengths.max()} tokens, at most {_MOST} - is {eod} the right --eod?"
        )
    return lengths


def index_flat(
    path: str | os.PathLike[str],
    eod: int,
    *,
    dtype: npt.DTypeLike | None = None,
    disk: Disk | None = None,
) -> None:
    """Write the .idx that makes FILE.bin a pair where it lies."""
    place = Path(path)
    if place.suffix != ".bin":
        raise DataError(
            f"{path} must be named *.bin to be a pair - give --output-prefix to copy it"
        )
    tokens, header = read_flat(path, dtype)
    if header is not None:
        raise DataError(
            f"{path} begins with {header.name} of {header.bytes} bytes, which are no tokens: give "
            "--output-prefix, and the tokens behind it are copied"
        )
    lengths = document_lengths(tokens, eod)
    bounds = np.arange(len(lengths) + 1, dtype=np.int64)
    disk = disk or Disk()
    disk.remove(place.with_suffix(".meta.json"))  # of a pair that was there before
    write_index(place.with_suffix(".idx"), tokens.dtype, lengths, bounds, disk)


def convert_flat(
    path: str | os.PathLike[str],
    eod: int,
    prefix: str | os.PathLike[str],
    *,
    dtype: npt.DTypeLike | None = None,
    disk: Disk | None = None,
) -> Header | None:
    """Copy a flat file to a pair of its own; returns the header that was left out."""
    tokens, header = read_flat(path, dtype)
    lengths = document_lengths(tokens, eod)
    stops = np.cumsum(lengths)
    with IndexedDatasetBuilder(f"{os.fspath(prefix)}.bin", tokens.dtype, disk) as builder:
        first, begin = 0, 0
        while first < len(lengths):
            last = max(first + 1, int(np.searchsorted(stops, begin + _CHUNK, side="right")))
            part = lengths[first:last]
            stop = int(stops[last - 1])
            builder.add_documents(tokens[begin:stop], part, np.ones(len(part), np.int64))
            first, begin = last, stop
        builder.finalize(f"{os.fspath(prefix)}.idx")
    return header
