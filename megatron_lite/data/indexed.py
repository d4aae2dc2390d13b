"""Token files in Megatron's format: `<prefix>.bin` holds the tokens, `<prefix>.idx` where they are.

    .idx   magic 9 | version u64 | dtype code u8 | sequences N u64 | D u64
           | N x int32 lengths | N x int64 byte offsets | D x int64 document bounds (0 .. N)
    .bin   the sequences one after the other, little-endian, nothing between

All little-endian without padding.  A document is one or more sequences; an empty one repeats a
bound.  Invariant, checked when writing and when opening: bytes of .bin == sum(lengths) * itemsize.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError
from megatron_lite.data.digest import digest_of
from megatron_lite.data.maps import FileMaps, read_failure
from megatron_lite.storage.reading import open_plain

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_DTYPES: dict[int, npt.DTypeLike] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
FLOAT_CODES = (6, 7)  # float64 and float32, in either order depending on who wrote the file
CODES = {np.dtype(dtype): code for code, dtype in TOKEN_DTYPES.items()}

IN_MEMORY_INDEX_BYTES = 1 << 20  # a small index is read whole: a mapping costs a file handle
CHECK_BLOCK = 1 << 15  # sequences checked at a time, in the processor's cache

TokenArray = npt.NDArray[np.integer[Any]]
Buffer: TypeAlias = "bytes | mmap.mmap"


def token_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """uint16 below 65,500 ids, else int32: the rule by which Megatron's tools choose."""
    small = vocab_size is not None and vocab_size < 65500
    return np.dtype(np.uint16 if small else np.int32)


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """The token file of a prefix."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """The index file of a prefix."""
    return Path(f"{os.fspath(prefix)}.idx")


@dataclass(frozen=True, slots=True)
class Index:
    """The arrays of an .idx file, read-only: lengths in tokens, byte offsets, document bounds."""

    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]


class Layout(NamedTuple):
    """What the header of an .idx says, and how many bytes follow from it."""

    dtype: np.dtype[Any]
    sequences: int
    bounds: int

    @property
    def size(self) -> int:
        """Bytes of the whole .idx."""
        return HEADER.size + 12 * self.sequences + 8 * self.bounds

    def arrays(self, buffer: Buffer) -> Index:
        """The arrays of an .idx of this layout, without a copy."""
        lengths = np.frombuffer(buffer, np.dtype("<i4"), self.sequences, HEADER.size)
        at = HEADER.size + 4 * self.sequences
        pointers = np.frombuffer(buffer, np.dtype("<i8"), self.sequences, at)
        at += 8 * self.sequences
        documents = np.frombuffer(buffer, np.dtype("<i8"), self.bounds, at)
        return Index(self.dtype, lengths, pointers, documents)


def read_index(path: Path) -> Index:
    """Read and check everything an .idx says about itself; DataError names what is wrong."""
    buffer = _read_or_map(path)
    return check_index(path, buffer).arrays(buffer)


def check_index(path: Path, buffer: Buffer) -> Layout:
    """Check the content of an .idx; DataError names what is wrong."""

    def refuse(what: str) -> NoReturn:
        raise DataError(f"{path}: {what} - it is no intact index; write the pair anew")

    if len(buffer) < HEADER.size:
        refuse(f"{len(buffer)} bytes, but the header alone has {HEADER.size}")
    magic, version, code, sequences, bounds = HEADER.unpack_from(buffer)
    if magic != MAGIC:
        refuse(f"begins with {bytes(magic)!r}, expected {MAGIC!r}")
    if version != VERSION:
        refuse(f"version {version}, expected {VERSION}")
    if code in FLOAT_CODES:
        refuse(f"dtype code {code} means floating point, but tokens are integers")
    if code not in TOKEN_DTYPES:
        refuse(f"dtype code {code}, expected one of {sorted(TOKEN_DTYPES)}")
    expected = HEADER.size + 12 * sequences + 8 * bounds
    if len(buffer) == expected + sequences and sequences:
        refuse(f"{sequences} bytes follow the index: sequence modes of a multimodal set, unknown")
    if len(buffer) != expected:
        refuse(
            f"{len(buffer)} bytes, expected {expected} for {sequences} sequences "
            f"and {bounds} document bounds"
        )
    layout = Layout(np.dtype(TOKEN_DTYPES[code]), sequences, bounds)
    index = layout.arrays(buffer)
    documents = index.documents
    if bounds == 0 or documents[0] != 0 or documents[-1] != sequences:
        ends = "none" if bounds == 0 else f"{documents[0]} .. {documents[-1]}"
        refuse(f"document bounds run from {ends}, expected 0 .. {sequences}")
    for start in range(0, bounds, CHECK_BLOCK):
        part = documents[start : start + CHECK_BLOCK + 1]
        falling = part[1:] < part[:-1]
        if falling.any():
            at = start + int(falling.argmax()) + 1
            refuse(f"document bound {at} is {documents[at]}, below {documents[at - 1]} before it")
    _check_pointers(index, refuse)
    return layout


def _read_or_map(path: Path) -> bytes | mmap.mmap:
    try:
        with open_plain(path) as file:
            if os.fstat(file.fileno()).st_size <= IN_MEMORY_INDEX_BYTES:
                return file.read()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist - a dataset is named by its prefix, the path without .bin/.idx"
        ) from error
    except OSError as error:
        raise read_failure(path, error) from error


def _check_pointers(index: Index, refuse: Any) -> None:
    """Offsets must be the running sum of the lengths: anything else would read other tokens."""
    running = 0
    for start in range(0, len(index.lengths), CHECK_BLOCK):
        lengths = index.lengths[start : start + CHECK_BLOCK].astype(np.int64)
        if lengths.min() < 0:
            at = int(lengths.argmin())
            refuse(f"sequence {start + at} has length {lengths[at]}")
        ends = running + np.cumsum(lengths * index.dtype.itemsize)
        begins = ends - lengths * index.dtype.itemsize
        wrong = np.flatnonzero(index.pointers[start : start + CHECK_BLOCK] != begins)
        if len(wrong):
            at = int(wrong[0])
            found = index.pointers[start + at]
            refuse(f"sequence {start + at} is said to begin at byte {found}, not {begins[at]}")
        running = int(ends[-1])


def _digest_of_index(buffer: Buffer) -> str:
    """Names the content of an .idx; above 64 MiB by its ends and 16 blocks between."""
    block = 1 << 20
    content = np.frombuffer(buffer, np.uint8)
    if len(content) <= 64 * block:
        return f"{digest_of(content):016x}"
    digest = len(content)
    for part in range(18):
        at = (len(content) - block) * part // 17 // 8 * 8
        digest = digest_of(content[at : at + block], digest)
    return f"{digest:016x}"


def extra_tokens(index: Index, bin_size: int) -> int | None:
    """Tokens that .bin has beyond the index if they are one for each document (all, or those not
    empty), as Megatron-DeepSpeed's --append-eod leaves it; else None."""
    bounds, itemsize = index.documents, index.dtype.itemsize
    extra, rest = divmod(bin_size, itemsize)
    extra -= int(index.lengths.sum(dtype=np.int64))
    documents = (len(bounds) - 1, int(np.count_nonzero(bounds[1:] > bounds[:-1])))
    return extra if rest == 0 and extra > 0 and extra in documents else None


class IndexedDataset:
    """Sequences of tokens in a `.bin`/`.idx` pair, mapped into memory on first use.

    `ds[i]` is sequence i as a read-only array of the file's dtype, `ds[a:b]` a list of them,
    `ds.get(i, offset, length)` a part of one.  Picklable: the files are opened anew.
    Raises DataError where the pair is missing, broken or does not belong together.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        *,
        mmap_bin: bool = True,
        maps: FileMaps | None = None,
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.mmap_bin = mmap_bin
        self._maps = FileMaps() if maps is None else maps
        self._bin, self._idx = bin_path(prefix), idx_path(prefix)
        buffer = _read_or_map(self._idx)
        self._layout = check_index(self._idx, buffer)
        self._small = self._layout.arrays(buffer) if isinstance(buffer, bytes) else None
        self._content = _digest_of_index(buffer)
        self._bin_size = self._check_bin(self._layout.arrays(buffer))

    @property
    def _index(self) -> Index:
        """The arrays; a large index stays mapped as long as it is referenced."""
        if self._small is not None:
            return self._small
        return self._layout.arrays(self._maps.get(self._idx, self._layout.size))

    @staticmethod
    def exists(prefix: str | os.PathLike[str]) -> bool:
        """Both files are there; the .idx is written last, so they are complete."""
        return idx_path(prefix).exists() and bin_path(prefix).exists()

    def _check_bin(self, index: Index) -> int:
        """Bytes of the .bin; DataError if they are not those of the index."""
        try:
            actual = self._bin.stat().st_size
        except FileNotFoundError as error:
            raise DataError(
                f"{self._bin} does not exist, but {idx_path(self.prefix)} does - copy both files"
            ) from error
        itemsize = self.dtype.itemsize
        tokens = int(index.lengths.sum(dtype=np.int64))
        expected = tokens * itemsize
        if actual == expected:
            return actual
        extra = extra_tokens(index, actual)
        if extra is not None:
            raise DataError(
                f"{self._bin} holds {tokens + extra} tokens, its index {tokens}: one more "
                f"for each of the {extra} documents. Megatron-DeepSpeed's "
                "preprocess_data.py --append-eod writes such pairs: the end-of-document tokens "
                "are in .bin but not in the lengths, so every document after the first would be "
                f"read shifted - mend it with tools/check_dataset.py {self.prefix} --repair OUT, or write "
                "the pair anew with tools/preprocess_data.py"
            )
        raise DataError(
            f"{self._bin} has {actual} bytes, expected {expected} ({tokens} tokens of {itemsize} "
            f"bytes by its .idx) - it is truncated or belongs to another .idx; copy both again"
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """The tokens' type in the file."""
        return self._layout.dtype

    @property
    def sequence_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of every sequence."""
        return self._index.lengths

    @property
    def document_indices(self) -> npt.NDArray[np.int64]:
        """Document d is the sequences [document_indices[d], document_indices[d + 1])."""
        return self._index.documents

    @property
    def sizes(self) -> npt.NDArray[np.int32]:
        """Megatron-DeepSpeed's name of sequence_lengths."""
        return self._index.lengths

    @property
    def doc_idx(self) -> npt.NDArray[np.int64]:
        """Megatron-DeepSpeed's name of document_indices."""
        return self._index.documents

    def __len__(self) -> int:
        return self._layout.sequences

    @overload
    def __getitem__(self, key: int) -> TokenArray: ...
    @overload
    def __getitem__(self, key: slice) -> list[TokenArray]: ...
    def __getitem__(self, key: int | slice) -> TokenArray | list[TokenArray]:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                raise ValueError(f"{self.prefix}: only slices of step 1 are contiguous, not {step}")
            if stop <= start:
                return []
            ends = np.cumsum(self._index.lengths[start:stop], dtype=np.int64)
            return np.split(self.run(start, stop), ends[:-1])
        return self.get(key)

    def run(self, start: int, stop: int) -> TokenArray:
        """The tokens of sequences start to stop - 1, end to end; start is below stop."""
        arrays = self._index
        count = int(arrays.lengths[start:stop].sum(dtype=np.int64))
        return self._read(int(arrays.pointers[start]), count)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> TokenArray:
        """`length` tokens (the rest by default) of a sequence from token `offset` on."""
        index = int(index)
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.prefix}: no sequence {index}, it has {len(self)}")
        arrays = self._index
        size = int(arrays.lengths[index])
        length = size - offset if length is None else int(length)
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(
                f"{self.prefix}: sequence {index} has {size} tokens, not [{offset}, "
                f"{offset + length})"
            )
        begin = int(arrays.pointers[index]) + int(offset) * self.dtype.itemsize
        return self._read(begin, length)

    def _read(self, begin: int, count: int) -> TokenArray:
        """count: tokens from byte `begin` on."""
        if count == 0:
            return np.empty(0, self.dtype)
        dtype = self.dtype.newbyteorder("<")
        if self.mmap_bin:
            mapped = self._maps.get(self._bin, self._bin_size)
            # a map's pages behind the end of a file that was cut kill the process (SIGBUS)
            if mapped.size() < begin + count * dtype.itemsize:
                self._refuse_shorter(mapped.size())
            return np.frombuffer(mapped, dtype, count, begin)
        with self._opened() as file:
            data = os.pread(file.fileno(), count * dtype.itemsize, begin)
            size = os.fstat(file.fileno()).st_size
        if len(data) != count * dtype.itemsize:
            self._refuse_shorter(size)
        return np.frombuffer(data, dtype)

    def _refuse_shorter(self, size: int) -> NoReturn:
        raise DataError(
            f"{self._bin} was cut to {size} bytes while it was in use, it had {self._bin_size} - "
            "copy it again and continue from the last checkpoint"
        )

    def _opened(self) -> Any:
        try:
            return open_plain(self._bin)
        except OSError as error:
            raise read_failure(self._bin, error) from error

    def content(self) -> str:
        """Names the content wherever it lies: hash of the .idx, size and four blocks of the .bin."""
        digest = hashlib.blake2b(f"{self._content} {self._bin_size}".encode(), digest_size=16)
        block = 4096
        with self._opened() as file:
            for part in range(4):
                file.seek(max(0, self._bin_size - block) * part // 3)
                digest.update(file.read(block))
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Names the content and the moment it was written: hash of the .idx and its time."""
        return f"{self._content} {self._bin_size} {self._idx.stat().st_mtime_ns}"

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "mmap_bin": self.mmap_bin}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["prefix"], mmap_bin=state["mmap_bin"])  # type: ignore[misc]
