"""Corpus files as batches: JSON lines, JSON arrays, Parquet, CSV or text; packed or not; whole or a shard.

    find_inputs ─▶ plan (kind and part of each file) ─▶ read_batches ─▶ Batch, Batch, ...

A batch holds whole records; it says where it begins, for messages, and where the next one begins,
for --resume.  What a file is, its first bytes say; only text and CSV are known by their names.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from megatron_lite.config.errors import DataError
from megatron_lite.data.preparing import streams
from megatron_lite.data.preparing.arrays import read_array
from megatron_lite.data.preparing.parts import (
    BOM,
    LONGEST_LINE,
    InputKind,
    InputPart,
    InputPlace,
    RecordBatch,
    TextUnit,
    count_newlines,
)
from megatron_lite.data.preparing.streams import (
    drop_line,
    open_stream,
    size_of,
    skip,
    stem,
    unreadable,
)
from megatron_lite.data.preparing.tables import read_parquet, read_table
from megatron_lite.data.preparing.texts import read_texts

RECORD_READERS = (".json", ".jsonl", ".parquet")
TABLES = (".csv", ".tsv")
TEXT = (".txt",)
RECORD = re.compile(rb'\{\s*"')  # how a JSON object begins

_log = logging.getLogger(__name__)


def find_inputs(patterns: Sequence[str]) -> list[str]:
    """The files that names, globs and folders mean; each one's in sorted order.

    Of a folder, those with a known suffix, at any depth; text and tables only where it holds no
    records: a README.txt beside the corpus is none of it.
    """
    found: list[str] = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            names = _inside(pattern)
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


def _inside(folder: str) -> list[str]:
    """The corpus files of a folder."""
    names = sorted(
        str(Path(where) / name)
        for where, _, inside in os.walk(folder)
        for name in inside
        if stem(name).endswith(RECORD_READERS + TABLES + TEXT) and not name.startswith(".")
    )
    records = [name for name in names if stem(name).endswith(RECORD_READERS)]
    if records and len(records) < len(names):
        _log.warning(
            "note: --input %s: %d .txt, .csv and .tsv files beside %d of records are left out - "
            "name them by a glob to have them",
            folder,
            len(names) - len(records),
            len(records),
        )
    if not names:
        raise DataError(
            f"--input {folder} is a folder without {', '.join(RECORD_READERS + TABLES + TEXT)} files "
            f"(or these with {', '.join(streams.SUFFIXES)}) - name files of other suffixes by a glob"
        )
    return records or names


def plan_inputs(
    paths: Sequence[str],
    shard: tuple[int, int] | None = None,
    *,
    unit: TextUnit | None = None,
) -> list[InputPart]:
    """What to read of every file; shard (i, n), i from 1, is the i-th of n equal cuts of all bytes.

    A line belongs to the shard in which it begins; a packed file, an array, a table, a Parquet
    file and a text that is not read line by line are never cut and belong to the shard in which
    they begin.
    """
    parts = [part_of(path, unit) for path in paths]
    if shard is None:
        return parts
    index, count = shard
    sizes = [size_of(path) for path in paths]
    total, offset = sum(sizes), 0
    low, high = total * (index - 1) // count, total * index // count
    chosen = []
    for part, size in zip(parts, sizes, strict=True):
        begin, end = max(low - offset, 0), min(high - offset, size)
        if part.kind == "lines" and not part.packed:
            if begin < end:
                chosen.append(replace(part, begin=begin, end=end))
        elif low <= offset < high:
            chosen.append(part)
        offset += size
    return chosen


def part_of(path: str, unit: TextUnit | None = None) -> InputPart:
    """What a file is; DataError where it is none that can be read.

    unit: what --text-unit says; None: a .txt file is one text, unless JSON lines are in it.
    """
    disk, content = streams.first_bytes(path)
    streams.refuse_foreign(path, content)
    packed, name = disk[:64] != content[:64], stem(path)
    if disk.startswith(streams.PARQUET):
        return InputPart(path, "parquet")
    if content.startswith(streams.PARQUET):
        raise DataError(f"--input {path} is packed Parquet - unpack it; Parquet packs its pages")
    if name.endswith(".parquet"):
        raise streams.not_what_it_says(path, "Parquet", disk)
    if name.endswith(TABLES):
        return InputPart(path, "table", packed=packed)
    text = content.removeprefix(BOM).lstrip()
    if name.endswith(TEXT) and unit is None and RECORD.match(text):
        _log.warning("note: --input %s holds JSON lines and is read as such; --text-unit line would "
                    "take them as text", path)  # fmt: skip
    elif name.endswith(TEXT) or (unit is not None and not name.endswith(RECORD_READERS)):
        kind: InputKind = "lines" if unit == "line" else "text"
        return InputPart(path, kind, packed=packed, unit=unit or "file")
    elif text and text[:1] not in (b"{", b"[") and not name.endswith(RECORD_READERS):
        raise DataError(
            f"--input {path} holds no JSON and its name tells nothing else - give --text-unit file, line or "
            "paragraph to read it as text, or call it .csv, .tsv, .json or .jsonl"
        )
    return InputPart(path, "array" if text[:1] == b"[" else "lines", packed=packed)


def read_batches(
    parts: Sequence[InputPart],
    batch_bytes: int,
    *,
    start: InputPlace | None = None,
    columns: Sequence[str] | None = None,
    longest: int = LONGEST_LINE,
) -> Iterator[RecordBatch]:
    """The batches of all parts from `start` on; columns are what Parquet files are read for.

    longest: bytes of a line, element, cell or text; of what is longer no more is kept in memory.
    """
    start = start or InputPlace()
    for number in range(start.part, len(parts)):
        part = parts[number]
        place = start if number == start.part else InputPlace(number)
        try:
            if part.kind == "parquet":
                yield from read_parquet(part, batch_bytes, place, columns, longest)
            elif part.kind == "array":
                yield from read_array(part, batch_bytes, place, longest)
            elif part.kind == "table":
                yield from read_table(part, batch_bytes, place, longest)
            elif part.kind == "text":
                yield from read_texts(part, batch_bytes, place, longest)
            else:
                yield from read_lines(part, batch_bytes, place, longest)
        except OSError as error:
            raise unreadable(part.path, error) from error


def read_lines(
    part: InputPart, batch_bytes: int, place: InputPlace, longest: int
) -> Iterator[RecordBatch]:
    """Batches of whole lines; a byte order mark at the beginning of the file is cut.

    Of a line that is too long as much is kept as shows that it is.
    """
    with ExitStack() as stack:
        stream, raw = open_stream(part.path, stack)
        origin = 0
        if part.begin:  # a line already begun belongs to the shard before
            stream.seek(part.begin - 1)
            origin = part.begin - 1 + drop_line(stream)
        position = place.position or origin
        skip(stream, position)
        line, done = place.line, raw.tell()
        while part.end is None or position < part.end:
            room = batch_bytes if part.end is None else min(batch_bytes, part.end - position)
            data = stream.read(room)
            if not data:
                break
            beginning, size = position == 0, len(data)
            if not data.endswith(b"\n"):
                begun = len(data) - (data.rfind(b"\n") + 1)
                data += stream.readline(max(longest - begun, 0) + 1)
                size = len(data)
                if not data.endswith(b"\n"):
                    size += drop_line(stream)
                    data += b"\n" * (size > len(data))
            position += size
            count, read, done = count_newlines(data), raw.tell() - done, raw.tell()
            after = InputPlace(place.part, position, line + count)
            if beginning:
                data = data.removeprefix(BOM)
            yield RecordBatch(
                part.path, line, after, read, data, origin, plain=part.unit is not None
            )
            line += count
