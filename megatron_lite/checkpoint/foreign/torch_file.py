"""Files of torch.save, opened without running anything: the zip of today, and what was before it.

    name/data.pkl     the object, a pickle          name/data/KEY   the numbers of one storage
    name/byteorder    little or big                 (torch 1.6 on: a zip whose entries are not packed)

    before that: pickles of a magic number, a version, the system, the object and a list of keys; then,
    in that order, each storage: its elements as 8 bytes, and the numbers.

Numbers are mapped from the file when a tensor is read, one tensor at a time.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from megatron_lite.checkpoint.foreign.pickle_reader import PickleError, read_pickle
from megatron_lite.checkpoint.foreign.records import Storage, UnreadTensor
from megatron_lite.config.errors import CheckpointError
from megatron_lite.storage.reading import open_plain

LARGEST_PICKLE = 1 << 28  # bytes
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LOCAL = struct.Struct("<4s5H3I2H")  # a zip's header before the data of an entry
_BLOCK = 1 << 22


class _Place(NamedTuple):
    """Where the bytes of a storage lie in the file; crc: of them, where it is known."""

    start: int
    bytes: int
    crc: int | None


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A file, or a stretch of one, that torch.save wrote: its value, with tensors still unread.

    swapped: whether the numbers were written by a machine of the other byte order.
    """

    path: Path
    value: Any
    places: Mapping[str, _Place]
    swapped: bool
    _seen: set[str] = field(default_factory=set)

    def read(self, tensor: UnreadTensor) -> Tensor:
        """A copy of one tensor; CheckpointError where its bytes are not there or not what was written."""
        place = self._place(tensor.storage)
        if not tensor.numel:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        with _mapped(self.path) as data:
            if place.crc is not None and tensor.storage.key not in self._seen:
                if _crc(data, place) != place.crc:
                    raise CheckpointError(
                        f"{self.path}: the bytes of storage {tensor.storage.key} are not those that were "
                        "written (CRC-32): copy the file once more"
                    )
                self._seen.add(tensor.storage.key)
            held = bytearray(data[place.start : place.start + tensor.storage.bytes])
        flat = torch.frombuffer(held, dtype=torch.uint8)
        if self.swapped and tensor.dtype.itemsize > 1:
            flat = flat.view(-1, tensor.dtype.itemsize).flip(1).reshape(-1)
        return (
            flat.view(tensor.dtype)
            .as_strided(tensor.shape, tensor.stride, tensor.offset)
            .clone(memory_format=torch.contiguous_format)
        )

    def _place(self, storage: Storage) -> _Place:
        place = self.places.get(storage.key)
        if place is None or place.bytes < storage.bytes:
            held = "is not there" if place is None else f"holds {place.bytes} bytes"
            raise CheckpointError(
                f"{self.path}: storage {storage.key[:40]} {held}, {storage.bytes} are needed: the file is "
                "cut off or damaged"
            )
        return place


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    try:
        with (
            open_plain(path) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            yield data
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _crc(data: mmap.mmap, place: _Place) -> int:
    found = 0
    for start in range(place.start, place.start + place.bytes, _BLOCK):
        found = zlib.crc32(data[start : min(start + _BLOCK, place.start + place.bytes)], found)
    return found


def open_torch_file(path: Path, *, start: int = 0, length: int | None = None) -> TorchFile:
    """Look through a file of torch.save, or a stretch of a file that is one.

    Raises CheckpointError for one that is none, cut off, packed, or larger than it may be.
    """
    size = _size(path)
    length = size - start if length is None else length
    if length <= 0 or start < 0 or start + length > size:
        raise CheckpointError(
            f"{path} has {size} bytes, {max(length, 1)} from {start} on are needed: it is cut off"
        )
    try:
        with open_plain(path) as file:
            stretch = _Stretch(file, start, length)
            if stretch.read(4) == b"PK\x03\x04":
                return _open_zip(path, stretch)
            stretch.seek(0)
            return _open_old(path, stretch)
    except PickleError as error:
        raise CheckpointError(
            f"{path} is damaged or no file of torch.save: its pickle: {error}"
        ) from None
    except (zipfile.BadZipFile, NotImplementedError, struct.error, EOFError, OSError, ValueError,
            KeyError, RuntimeError, OverflowError) as error:  # fmt: skip
        raise CheckpointError(f"{path} is damaged or no file of torch.save: {error}") from None


def _size(path: Path) -> int:
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is not there, or no file: copy the whole checkpoint")
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


class _Stretch(io.RawIOBase):
    """A stretch of a file as if it were one."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError("a place before the file's first byte")
        self.at = base + offset
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(self.length - self.at, 0)
        self.file.seek(self.start + self.at)
        found = self.file.read(left if size is None or size < 0 else min(size, left))
        self.at += len(found)
        return found


def _open_zip(path: Path, stretch: _Stretch) -> TorchFile:
    with zipfile.ZipFile(stretch) as archive:  # type: ignore[arg-type] # it reads, seeks and tells
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickled = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickled) != 1:
            inside = ", ".join(sorted(entries)[:3])
            raise CheckpointError(
                f"{path} is a zip with {len(pickled)} files */data.pkl ({inside[:100]}): no file of "
                "torch.save (TorchScript's are not read)"
            )
        folder = pickled[0].removesuffix("data.pkl")
        for entry in entries.values():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path}: {entry.filename[:60]} is packed; torch.save packs none"
                )
        if entries[pickled[0]].file_size > LARGEST_PICKLE:
            raise CheckpointError(
                f"{path}: its pickle has {entries[pickled[0]].file_size} bytes, more than "
                f"{LARGEST_PICKLE}"
            )
        order = b"little"
        if f"{folder}byteorder" in entries:
            order = archive.read(f"{folder}byteorder")[:10]
        value = read_pickle(archive.read(pickled[0])).value
        places = {
            name.removeprefix(f"{folder}data/"): _place_of(entry, stretch)
            for name, entry in entries.items()
            if name.startswith(f"{folder}data/")
        }
    if order not in (b"little", b"big"):
        raise CheckpointError(f"{path}: the byte order {order!r} is not known")
    return TorchFile(path, value, places, order == b"big")


def _place_of(entry: zipfile.ZipInfo, stretch: _Stretch) -> _Place:
    """Past the entry's own header, whose extra field pads the data to a multiple of 64 bytes."""
    stretch.seek(entry.header_offset)
    magic, *_, name, extra = _LOCAL.unpack(stretch.read(_LOCAL.size))
    begin = entry.header_offset + _LOCAL.size + name + extra
    if magic != b"PK\x03\x04" or begin + entry.file_size > stretch.length:
        raise zipfile.BadZipFile(f"{entry.filename[:60]} is not inside the file")
    return _Place(stretch.start + begin, entry.file_size, entry.CRC)


def _open_old(path: Path, stretch: _Stretch) -> TorchFile:
    data = stretch.read(min(stretch.length, LARGEST_PICKLE))
    magic, at = _next(data, 0)
    if magic != _MAGIC:
        raise PickleError("it does not begin with the number that torch.save writes")
    protocol, at = _next(data, at)
    system, at = _next(data, at)
    if protocol != _PROTOCOL or not isinstance(system, dict):
        raise PickleError(f"its version {str(protocol)[:20]} is not {_PROTOCOL}")
    value, at = _next(data, at)
    keys, at = _next(data, at)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PickleError("its storages are no list of names")
    storages = {storage.key: storage for storage in _storages(value)}
    places: dict[str, _Place] = {}
    swapped = system.get("little_endian") is False
    for key in keys:
        stretch.seek(at)
        head = stretch.read(8)
        numel = int.from_bytes(head, "big" if swapped else "little")
        if key not in storages or numel != storages[key].numel or len(head) < 8:
            raise CheckpointError(
                f"{path}: storage {key[:40]} is not of the size that its tensors have: the file is cut "
                "off or damaged"
            )
        size = storages[key].bytes
        if at + 8 + size > stretch.length:
            raise CheckpointError(f"{path} ends inside of storage {key[:40]}: it is cut off")
        places[key] = _Place(stretch.start + at + 8, size, None)
        at += 8 + size
    return TorchFile(path, value, places, swapped)


def _next(data: bytes, start: int) -> tuple[Any, int]:
    return read_pickle(data, start=start)


def _storages(value: Any) -> Iterator[Storage]:
    """Every storage inside of a value; nothing is looked at twice."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, UnreadTensor):
            yield one.storage
        elif isinstance(one, Storage):
            yield one
        elif id(one) not in seen:
            seen.add(id(one))
            if isinstance(one, dict):
                stack += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple):
                stack += one
            elif hasattr(one, "state"):
                stack += [*one.args, *one.state]
