"""Corpus files as batches: JSON lines, JSON arrays, Parquet; plain, .gz or .zst; whole or a shard.

    find_inputs ─▶ plan (kind and part of each file) ─▶ read_batches ─▶ Batch, Batch, ...

A batch holds whole lines as bytes, cut at newlines only; it says where it begins, for messages,
and where the next one begins, for --resume.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from megatron_lite.config.errors import ConfigError, DataError

BOM = b"\xef\xbb\xbf"
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet")
COMPRESSED = (".gz", ".zst")
SNIFFED_BYTES = 1 << 16

Kind = Literal["lines", "array", "parquet"]


@dataclass(frozen=True, slots=True)
class Part:
    """A file to be read: all of it, or of plain JSON lines those that begin in [begin, end)."""

    path: str
    kind: Kind
    begin: int = 0
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where reading goes on: input number; byte, element or row; line number counted so far."""

    part: int = 0
    position: int = 0
    line: int = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole records of one file, as lines or (Parquet) as dicts, and where the next batch begins.

    `line` is the number of the first line (element's line, row) counted from byte `origin`.
    """

    path: str
    line: int
    next: Place
    read: int  # bytes on disk since the last batch: for the progress bar
    data: bytes = b""
    origin: int = 0
    numbers: tuple[int, ...] | None = None
    records: tuple[dict[str, Any], ...] | None = None

    def where(self, index: int) -> str:
        """`file:line` of line `index` of this batch; counts the lines before a shard's begin."""
        if self.numbers is not None:
            return f"{self.path}:{self.numbers[index]}"
        before = count_lines(self.path, self.origin) if self.origin else 0
        return f"{self.path}:{before + self.line + index}"


def find_inputs(patterns: Sequence[str]) -> list[str]:
    """The files that names, globs and folders mean; each one's in sorted order.

    Of a folder, those with a known suffix, at any depth.
    """
    found: list[str] = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            names = sorted(
                str(Path(folder) / name)
                for folder, _, inside in os.walk(pattern)
                for name in inside
                if name.endswith(SUFFIXES) and not name.startswith(".")
            )
            if not names:
                raise DataError(
                    f"--input {pattern} is a folder without {', '.join(SUFFIXES)} files - "
                    "name files of other suffixes by a glob"
                )
        else:
            names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
            names = [name for name in names if not Path(name).is_dir()]
        if not names:
            raise DataError(f"--input {pattern} does not exist - check the path or the glob")
        for name in names:
            if not Path(name).is_file():
                raise DataError(f"--input {name} is no file - name its files or a glob")
        found += names
    return found


def plan(paths: Sequence[str], shard: tuple[int, int] | None = None) -> list[Part]:
    """What to read of every file; shard (i, n), i from 1, is the i-th of n equal cuts of all bytes.

    A line belongs to the shard in which it begins; a compressed file, an array and a Parquet file
    are never cut and belong to the shard in which they begin.
    """
    parts = [Part(path, kind_of(path)) for path in paths]
    if shard is None:
        return parts
    index, count = shard
    sizes = [size_of(path) for path in paths]
    total, offset = sum(sizes), 0
    low, high = total * (index - 1) // count, total * index // count
    chosen = []
    for part, size in zip(parts, sizes, strict=True):
        begin, end = max(low - offset, 0), min(high - offset, size)
        if part.kind == "lines" and not part.path.endswith(COMPRESSED):
            if begin < end:
                chosen.append(Part(part.path, part.kind, begin, end))
        elif low <= offset < high:
            chosen.append(part)
        offset += size
    return chosen


def size_of(path: str) -> int:
    """Bytes on disk."""
    return Path(path).stat().st_size


def kind_of(path: str) -> Kind:
    """Parquet by its suffix; a JSON array if the first character is a bracket."""
    if path.endswith(".parquet"):
        return "parquet"
    try:
        with ExitStack() as stack:
            stream, _ = open_stream(path, stack)
            beginning = stream.read(SNIFFED_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error
    return "array" if beginning.removeprefix(BOM).lstrip()[:1] == b"[" else "lines"


def open_stream(path: str, stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """The (decompressed) bytes, and the file on disk, whose position is the progress."""
    raw: IO[bytes] = stack.enter_context(open(path, "rb"))  # noqa: SIM115  the stack closes it
    if path.endswith(".gz"):
        unpacked: Any = gzip.GzipFile(fileobj=raw)
        return stack.enter_context(unpacked), raw
    if path.endswith(".zst"):
        try:
            import zstandard  # noqa: PLC0415  an optional extra
        except ImportError as error:
            raise ConfigError(
                f"--input {path} needs the package `zstandard`: pip install 'megatron_lite[zstd]'"
            ) from error
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return stack.enter_context(io.BufferedReader(reader, 1 << 20)), raw
    return raw, raw


def unreadable(path: str, error: Exception) -> DataError:
    """A file that is missing, cut off or not what its suffix says."""
    what = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DataError(f"--input {path} cannot be read: {what} - is the file whole? copy it again")


def count_lines(path: str, end: int) -> int:
    """Newlines in the first `end` bytes."""
    count = 0
    with open(path, "rb") as file:
        while end > 0 and (data := file.read(min(end, 1 << 24))):
            count += data.count(b"\n")
            end -= len(data)
    return count


def read_batches(
    parts: Sequence[Part],
    batch_bytes: int,
    *,
    start: Place | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[Batch]:
    """The batches of all parts from `start` on; columns are what Parquet files are read for."""
    start = start or Place()
    for number in range(start.part, len(parts)):
        part = parts[number]
        place = start if number == start.part else Place(number)
        try:
            if part.kind == "parquet":
                yield from read_parquet(part, batch_bytes, place, columns)
            elif part.kind == "array":
                yield from read_array(part, batch_bytes, place)
            else:
                yield from read_lines(part, batch_bytes, place)
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(part.path, error) from error


def read_lines(part: Part, batch_bytes: int, place: Place) -> Iterator[Batch]:
    """Batches of whole lines; a byte order mark at the beginning of the file is cut."""
    with ExitStack() as stack:
        stream, raw = open_stream(part.path, stack)
        origin = 0
        if part.begin:  # the line under way belongs to the shard before
            stream.seek(part.begin - 1)
            origin = part.begin - 1 + len(stream.readline())
        position = place.position or origin
        skip(stream, position)
        line, done = place.line, raw.tell()
        while part.end is None or position < part.end:
            room = batch_bytes if part.end is None else min(batch_bytes, part.end - position)
            data = stream.read(room)
            if not data:
                break
            if not data.endswith(b"\n"):
                data += stream.readline()
            beginning = position == 0
            position += len(data)
            count, read, done = data.count(b"\n"), raw.tell() - done, raw.tell()
            after = Place(place.part, position, line + count)
            if beginning:
                data = data.removeprefix(BOM)
            yield Batch(part.path, line, after, read, data, origin)
            line += count


def skip(stream: IO[bytes], size: int) -> None:
    """Go `size` bytes forward from the beginning; a compressed stream is read and thrown away."""
    if isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO):
        stream.seek(size)  # forward or back
        return
    while size > 0 and (data := stream.read(min(size, 1 << 22))):
        size -= len(data)


def read_array(part: Part, batch_bytes: int, place: Place) -> Iterator[Batch]:
    """The elements of a JSON array, one line each; at most a few elements beyond a batch in memory.

    Newlines between the parts of a pretty-printed element become spaces: inside strings JSON
    allows none.
    """
    with ExitStack() as stack:
        stream, raw = open_stream(part.path, stack)
        elements = array_elements(part.path, stream, batch_bytes)
        for _ in range(place.position):
            next(elements, None)
        done, position = 0, place.position
        while True:
            lines: list[bytes] = []
            numbers: list[int] = []
            size = 0
            for number, text in elements:
                lines.append(text.encode("utf-8").replace(b"\n", b" ").replace(b"\r", b" "))
                numbers.append(number)
                size += len(lines[-1])
                if size >= batch_bytes:
                    break
            if not lines:
                return
            position += len(lines)
            read, done = raw.tell() - done, raw.tell()
            yield Batch(
                part.path,
                numbers[0],
                Place(place.part, position),
                read,
                b"\n".join(lines),
                numbers=tuple(numbers),
            )


def array_elements(path: str, stream: IO[bytes], block: int) -> Iterator[tuple[int, str]]:
    """(line, text) of every element of a JSON array."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    scanner = json.JSONDecoder()
    text, at, line, ended = "", 0, 1, False

    def refuse(what: str, position: int) -> DataError:
        number = line + text.count("\n", 0, position)
        start = text[position : position + 80]
        return DataError(
            f"{path}:{number}: {what} - a JSON array that is broken cannot be read on; "
            f"mend it here: {start}"
        )

    def more() -> bool:
        """Read on, dropping what was used; False at the end of the file."""
        nonlocal text, at, line, ended
        data = stream.read(max(block, 2 * (len(text) - at)))
        ended = not data
        line += text.count("\n", 0, at)
        try:
            text, at = text[at:] + decode(data, ended), 0
        except UnicodeDecodeError as error:
            raise refuse(f"no UTF-8 ({error.reason})", 0) from error
        return not ended

    def next_character() -> str:
        """The next character that is no space, "" at the end."""
        nonlocal at
        while True:
            while at < len(text) and text[at] in " \t\r\n\ufeff":
                at += 1
            if at < len(text):
                return text[at]
            if not more():
                return ""

    assert next_character() == "[", "only files that begin with a bracket are read as arrays"
    at += 1
    for count in itertools.count():
        character = next_character()
        if character == "]":
            break
        if count:
            if character != ",":
                raise refuse("no comma between two elements, or the array does not end", at)
            at += 1
            next_character()
        while True:
            try:
                _, end = scanner.raw_decode(text, at)
                break
            except (json.JSONDecodeError, RecursionError) as error:
                cut_off = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated") or error.pos >= len(text) - 16
                )
                if not cut_off or not more():
                    raise refuse(f"no JSON ({error})", at) from error
        yield line + text.count("\n", 0, at), text[at:end]
        at = end
    at += 1
    if next_character():
        raise refuse("something follows the array", at)


def read_parquet(
    part: Part, batch_bytes: int, place: Place, columns: Sequence[str] | None
) -> Iterator[Batch]:
    """Rows as dicts, row group by row group."""
    try:
        import pyarrow  # noqa: PLC0415  an optional extra
        import pyarrow.parquet  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise ConfigError(
            f"--input {part.path} needs the package `pyarrow`: pip install 'megatron_lite[parquet]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(part.path) as file:
            present = file.schema_arrow.names
            wanted = present if columns is None else [name for name in columns if name in present]
            total, row = max(file.metadata.num_rows, 1), 0
            size = size_of(part.path)
            for group in range(file.metadata.num_row_groups):
                facts = file.metadata.row_group(group)
                if row + facts.num_rows <= place.position:
                    row += facts.num_rows
                    continue
                each = max(facts.total_byte_size // max(facts.num_rows, 1), 1)
                rows = min(max(batch_bytes // each, 1), 1 << 14)
                for table in file.iter_batches(rows, row_groups=[group], columns=wanted):
                    records = table.to_pylist()[max(place.position - row, 0) :]
                    begin = row + table.num_rows - len(records)
                    row += table.num_rows
                    if records:
                        after = Place(place.part, row)
                        read = size * row // total - size * begin // total
                        yield Batch(part.path, begin + 1, after, read, records=tuple(records))
    except pyarrow.ArrowException as error:
        raise unreadable(part.path, error) from error
