"""A corpus file's bytes: its first bytes tell whether it is packed, and its end is verified.

    file ─▶ first bytes ─▶ plain                                        ─▶ bytes
                        └▶ a packing, frame after frame to the last one ─▶ bytes

A packed file that ends inside a frame, holds something else behind one, or fails its checksum is a
DataError with the offset at which that was found, whatever the file is called.
"""

from __future__ import annotations

import importlib
import io
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.extras import how_to_install

PARQUET = b"PAR1"  # begins and ends such a file
SNIFFED_BYTES = 1 << 16
# A block of three bytes can unpack to 128 KiB (zstd): so little at a time keeps memory bounded.
_PIECE = 1 << 12


@dataclass(frozen=True, slots=True)
class Packing:
    """A way to compress: how it is told, undone, and what its library raises."""

    name: str
    suffix: str
    magic: tuple[bytes, ...]
    module: str
    decoder: Callable[[Any], Any]
    error: str
    extra: str | None = None
    padding: bool = False  # zeros may follow a frame (tapes, tar)

    def load(self, path: str) -> Any:
        """The library; ConfigError where it is not installed."""
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            way_out = (
                how_to_install(self.extra)
                if self.extra
                else f"this Python was built without it; unpack {path} first"
            )
            raise ConfigError(
                f"--input {path} needs the package `{self.module}`: {way_out}"
            ) from error


ZSTD_MAGIC = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16)))
PACKINGS = (
    Packing("gzip", ".gz", (b"\x1f\x8b",), "zlib", lambda m: m.decompressobj(31), "error",
            padding=True),
    Packing("Zstandard", ".zst", ZSTD_MAGIC, "zstandard",
            # some corpora are packed with windows of 2 GiB (zstd --long=31)
            lambda m: m.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), "ZstdError",
            extra="zstd"),
    Packing("bzip2", ".bz2", (b"BZh",), "bz2", lambda m: m.BZ2Decompressor(), ""),
    Packing("xz", ".xz", (b"\xfd7zXZ\x00",), "lzma", lambda m: m.LZMADecompressor(), "LZMAError",
            padding=True),
)  # fmt: skip
SUFFIXES = tuple(packing.suffix for packing in PACKINGS)

FOREIGN = (
    (0, b"PK\x03\x04", "a zip archive", "unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (0, b"Rar!\x1a\x07", "a rar archive", "unpack it"),
    (257, b"ustar", "a tar archive", "unpack it"),
    (0, b"\x04\x22\x4d\x18", "an lz4 file", "unpack it"),
    (0, b"\xff\x06\x00\x00sNaPpY", "a snappy file", "unpack it"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", "write it as Parquet or JSON lines"),
    (0, b"ARROW1", "an Arrow file", "write it as Parquet or JSON lines"),
    (0, b"FEA1", "a Feather file", "write it as Parquet or JSON lines"),
    (0, b"ORC", "an ORC file", "write it as Parquet or JSON lines"),
    (0, b"Obj\x01", "an Avro file", "write it as Parquet or JSON lines"),
    (0, b"\x93NUMPY", "a numpy array", "tools/convert_flat.py takes flat token files"),
    (0, b"\x89HDF", "an HDF5 file", "write it as Parquet or JSON lines"),
    (0, b"SQLite format 3\x00", "a SQLite data base", "write it as JSON lines"),
    (0, b"MMIDIDX\x00\x00", "an index of token files", "it is tokenized already"),
    (0, b"%PDF-", "a PDF", "write its text as JSON lines"),
    (0, b"\xff\xfe", "UTF-16 text", "write it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    (0, b"\xfe\xff", "UTF-16 text", "write it as UTF-8: iconv -f UTF-16 -t UTF-8"),
)


def stem(path: str) -> str:
    """The name in small letters, without what says how it is packed."""
    path = path.lower()
    for suffix in SUFFIXES:
        path = path.removesuffix(suffix)
    return path


def size_of(path: str) -> int:
    """Bytes on disk."""
    return Path(path).stat().st_size


def unreadable(path: str, error: Exception) -> DataError:
    """A file that is missing or that the system cannot read."""
    what = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DataError(f"--input {path} cannot be read: {what} - is the file whole? copy it again")


def damaged(path: str, offset: int, what: str) -> DataError:
    """A file that is cut off or not what it says it is, and where that was found."""
    return DataError(
        f"--input {path} cannot be read: {what} at byte {offset} of {size_of(path)} - "
        "the file is damaged or was not copied whole; copy it again"
    )


def not_what_it_says(path: str, kind: str, beginning: bytes) -> DataError:
    """A file whose name promises a kind that its first bytes are not."""
    return damaged(path, 0, f"no {kind} (it begins with {beginning[:4].hex() or 'nothing'})")


def packing_of(path: str, beginning: bytes) -> Packing | None:
    """What the first bytes say; DataError where the name says packed and the bytes do not."""
    for packing in PACKINGS:
        if beginning.startswith(packing.magic):
            return packing
    if beginning.startswith(PARQUET):  # packs its own pages
        return None
    for packing in PACKINGS:
        if path.endswith(packing.suffix):
            if beginning and any(magic.startswith(beginning) for magic in packing.magic):
                raise damaged(path, len(beginning), f"{packing.name} ends in the middle")
            raise not_what_it_says(path, packing.name, beginning)
    return None


def refuse_foreign(path: str, beginning: bytes) -> None:
    """DataError for what is no text at all, by its first bytes."""
    for offset, magic, what, way_out in FOREIGN:
        if beginning[offset:].startswith(magic):
            raise DataError(f"--input {path} is {what} - {way_out}")


class Unpacked(io.RawIOBase):
    """The bytes of a packed file, frame after frame; its end is an end only between two frames."""

    def __init__(self, path: str, raw: IO[bytes], packing: Packing) -> None:
        super().__init__()
        self._path, self._raw, self._packing = path, raw, packing
        self._module = packing.load(path)
        raised = getattr(self._module, packing.error) if packing.error else OSError
        self._raised = (raised, OSError, EOFError, ValueError, MemoryError)
        self._decoder: Any = None  # of the current frame
        self._left = b""  # read, not yet unpacked
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes; 0 at the proved end."""
        while not self._ready and self._unpack():
            pass
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _unpack(self) -> bool:
        """One piece more; False at the end of the file."""
        data = self._left or self._raw.read(_PIECE)
        at, self._left = self._raw.tell() - len(data), b""
        if self._decoder is None:
            if not data:
                return False
            if self._packing.padding and at:
                at, data = at + len(data) - len(data.lstrip(b"\0")), data.lstrip(b"\0")
                if not data:
                    return True
            self._decoder = self._packing.decoder(self._module)
        elif not data:
            raise damaged(self._path, at, f"{self._packing.name} ends in the middle")
        try:
            self._ready = memoryview(self._decoder.decompress(data))
        except self._raised as error:
            what = f"broken {self._packing.name} ({str(error) or type(error).__name__})"
            raise damaged(self._path, at, what) from error
        if self._decoder.eof:
            self._left, self._decoder = self._decoder.unused_data, None
        return True


def open_stream(path: str, stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """The (unpacked) bytes, and the file on disk, whose position is the progress."""
    raw: IO[bytes] = stack.enter_context(open(path, "rb"))  # noqa: SIM115  the stack closes it
    packing = packing_of(path, raw.read(SNIFFED_BYTES))
    raw.seek(0)
    if packing is None:
        return raw, raw
    unpacked = Unpacked(path, raw, packing)
    return stack.enter_context(io.BufferedReader(unpacked, 1 << 20)), raw


def first_bytes(path: str) -> tuple[bytes, bytes]:
    """The first bytes on disk, and the first of the unpacked content."""
    try:
        with ExitStack() as stack:
            stream, raw = open_stream(path, stack)
            unpacked = stream.read(SNIFFED_BYTES)
            raw.seek(0)
            return raw.read(SNIFFED_BYTES), unpacked
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def skip(stream: IO[bytes], size: int) -> None:
    """Go `size` bytes forward from the beginning; a packed stream is read and thrown away."""
    if isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO):
        stream.seek(size)  # forward or back
        return
    while size > 0 and (data := stream.read(min(size, 1 << 22))):
        size -= len(data)


def drop_line(stream: IO[bytes]) -> int:
    """Read to the end of the current line; returns how many bytes that were."""
    dropped = 0
    while data := stream.readline(1 << 20):
        dropped += len(data)
        if data.endswith(b"\n"):
            break
    return dropped
