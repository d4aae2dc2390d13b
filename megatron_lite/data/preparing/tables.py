"""Tables as records: rows of Parquet and of comma-separated values, a batch at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import IO, Any

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.extras import how_to_install
from megatron_lite.data.preparing.parts import (
    BOM,
    InputPart,
    InputPlace,
    InputRecord,
    NoRecord,
    RecordBatch,
    too_long,
)
from megatron_lite.data.preparing.streams import (
    PARQUET,
    damaged,
    drop_line,
    open_stream,
    size_of,
    stem,
)


def read_parquet(
    part: InputPart,
    batch_bytes: int,
    place: InputPlace,
    columns: Sequence[str] | None,
    longest: int,
) -> Iterator[RecordBatch]:
    """Rows as dicts, row group by row group."""
    try:
        import pyarrow  # noqa: PLC0415  an optional extra
        import pyarrow.parquet  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise ConfigError(
            f"--input {part.path} needs the package `pyarrow`: {how_to_install('parquet')}"
        ) from error
    _check_footer(part.path)
    size, offset, row = size_of(part.path), 0, 0
    try:
        with pyarrow.parquet.ParquetFile(
            part.path, page_checksum_verification=True, pre_buffer=False
        ) as file:
            present = file.schema_arrow.names
            wanted = present if columns is None else [name for name in columns if name in present]
            total = max(file.metadata.num_rows, 1)
            for group in range(file.metadata.num_row_groups):
                facts = file.metadata.row_group(group)
                if row + facts.num_rows <= place.position:
                    row += facts.num_rows
                    continue
                offset = _offset(facts, wanted)
                each = max(facts.total_byte_size // max(facts.num_rows, 1), 1)
                rows = min(max(batch_bytes // each, 1), 1 << 14)
                expected = row + facts.num_rows
                for table in file.iter_batches(rows, row_groups=[group], columns=wanted):
                    table.validate(full=True)
                    found = table.to_pylist()[max(place.position - row, 0) :]
                    begin = row + table.num_rows - len(found)
                    row += table.num_rows
                    if found:
                        after = InputPlace(place.part, row)
                        read = size * row // total - size * begin // total
                        records = tuple(_bounded(record, longest) for record in found)
                        yield RecordBatch(part.path, begin + 1, after, read, records=records)
                if row != expected:
                    what = f"Parquet's row group {group} ends at row {row} of {expected}"
                    raise damaged(part.path, offset, what)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise damaged(part.path, offset, f"broken Parquet after row {row} ({what})") from error


def _check_footer(path: str) -> None:
    """A Parquet file that was cut off lacks what its last bytes say."""
    size = size_of(path)
    with open(path, "rb") as file:
        file.seek(max(size - 8, 0))
        last = file.read()
    length = int.from_bytes(last[:4], "little")
    if size < 12 or last[4:] != PARQUET or length + 12 > size:
        raise damaged(path, size, "Parquet's footer is missing")


def _offset(facts: Any, wanted: Sequence[str]) -> int:
    """Where the first page of a row group's wanted columns is."""
    found = []
    for number in range(facts.num_columns):
        column = facts.column(number)
        if column.path_in_schema.split(".")[0] in wanted:
            pages = column.dictionary_page_offset, column.data_page_offset
            found.append(min(page for page in pages if page is not None))
    return min(found, default=0)


def _bounded(record: dict[str, Any], longest: int) -> InputRecord:
    """The record, unless one of its cells is too long."""
    for value in record.values():
        if isinstance(value, str | bytes) and len(value) > longest:
            return too_long(longest)
    return record


def read_table(
    part: InputPart, batch_bytes: int, place: InputPlace, longest: int
) -> Iterator[RecordBatch]:
    """Rows of comma- or tab-separated values as dicts by the names of the first row."""
    with ExitStack() as stack:
        stream, raw = open_stream(part.path, stack)
        done, position = 0, 0
        rows = table_rows(part.path, stream, longest)
        while True:
            records: list[InputRecord] = []
            numbers: list[int] = []
            size = 0
            for number, length, record in rows:
                position += 1
                if position <= place.position:
                    continue
                records.append(record)
                numbers.append(number)
                size += length
                if size >= batch_bytes:
                    break
            if not records:
                return
            read, done = raw.tell() - done, raw.tell()
            after = InputPlace(place.part, position)
            yield RecordBatch(part.path, numbers[0], after, read,
                        numbers=tuple(numbers), records=tuple(records))  # fmt: skip


class RowReader:
    """Rows of a CSV stream with the line each begins on; a line that is too long ends its row."""

    def __init__(self, path: str, stream: IO[bytes], longest: int) -> None:
        self._stream, self._longest = stream, longest
        self._delimiter = "\t" if stem(path).endswith(".tsv") else ","
        self.line = self.read = 0  # lines and bytes so far
        self._begin()

    def _begin(self) -> None:
        self._rows = csv.reader(self._lines(), delimiter=self._delimiter, strict=True)

    def _lines(self) -> Iterator[str]:
        while data := self._stream.readline(self._longest + 1):
            self.line += 1
            self.read += len(data)
            if len(data) > self._longest and not data.endswith(b"\n"):
                drop_line(self._stream)
                raise OverflowError
            # a byte that is no UTF-8 becomes half of a surrogate pair, which is refused below
            yield data.removeprefix(BOM).decode("utf-8", "surrogateescape")

    def row(self) -> list[str] | NoRecord | None:
        """The next row, why it is none, or None at the end."""
        csv.field_size_limit(self._longest)
        try:
            row = next(self._rows, None)
        except OverflowError:
            self._begin()
            return too_long(self._longest)
        except csv.Error as error:
            if "field larger" in str(error):
                return too_long(self._longest)
            return NoRecord("no CSV", f"no CSV ({error})")
        if row is not None and not all(value.isascii() or _is_utf8(value) for value in row):
            return NoRecord("no UTF-8", "no UTF-8")
        return row


def table_rows(
    path: str, stream: IO[bytes], longest: int
) -> Iterator[tuple[int, int, InputRecord]]:
    """(line, bytes, record) of every row behind the header; what is no row says why."""
    rows = RowReader(path, stream, longest)
    header = rows.row()
    if isinstance(header, NoRecord):
        raise DataError(f"{path}:1: {header.story} - the first row must name the columns")
    if header is not None and len(set(header)) != len(header):
        raise DataError(f"{path}:1: the header names a column twice: {header}")
    while header is not None:
        number, before = rows.line + 1, rows.read
        row = rows.row()
        if row is None:
            return
        record: InputRecord
        if isinstance(row, NoRecord):
            record = row
        elif not row:
            continue
        elif len(row) != len(header):
            what = f"{len(row)} fields, the header has {len(header)}"
            record = NoRecord("other fields than the header", what)
        else:
            record = dict(zip(header, row, strict=True))
        yield number, rows.read - before, record


def _is_utf8(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
