"""Text files as records {"text": ...}: a whole file, or its paragraphs.

Lines, the third unit, are read like JSON lines.  CRLF becomes a newline, as text files are read
everywhere; a paragraph ends before a blank line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO

from megatron_lite.data.preparing.parts import (
    BOM,
    InputPart,
    InputPlace,
    InputRecord,
    NoRecord,
    RecordBatch,
    too_long,
)
from megatron_lite.data.preparing.streams import drop_line, open_stream, skip


def text_record(data: bytes, longest: int) -> InputRecord:
    """The bytes of a text as the record {"text": ...}; what is too long or no UTF-8 says so."""
    if len(data) > longest:
        return too_long(longest)
    try:
        return {"text": data.replace(b"\r\n", b"\n").decode("utf-8")}
    except UnicodeDecodeError as error:
        return NoRecord("no UTF-8", f"no UTF-8 ({error.reason} at its byte {error.start})")


def read_texts(
    part: InputPart, batch_bytes: int, place: InputPlace, longest: int
) -> Iterator[RecordBatch]:
    """Batches of whole texts."""
    with ExitStack() as stack:
        stream, raw = open_stream(part.path, stack)
        skip(stream, place.position)
        done, position, line = raw.tell(), place.position, place.line
        texts = (
            paragraphs(stream, longest) if part.unit == "paragraph" else whole_text(stream, longest)
        )
        while True:
            records: list[InputRecord] = []
            numbers: list[int] = []
            size = 0
            for offset, read_lines, read_bytes, data in texts:
                if data:
                    text = data.removeprefix(BOM) if position == 0 else data
                    records.append(text_record(text, longest))
                    numbers.append(line + offset)
                    size += len(data)
                position, line = position + read_bytes, line + read_lines
                if size >= batch_bytes:
                    break
            if not records:
                return
            read, done = raw.tell() - done, raw.tell()
            after = InputPlace(place.part, position, line)
            yield RecordBatch(part.path, numbers[0], after, read,
                        numbers=tuple(numbers), records=tuple(records))  # fmt: skip


TextPiece = tuple[int, int, int, bytes]


def whole_text(stream: IO[bytes], longest: int) -> Iterator[TextPiece]:
    """The rest of the file as one text, of which no more is kept than shows that it is too long."""
    data, dropped = stream.read(longest + 1), 0
    while len(data) > longest and (more := stream.read(1 << 20)):
        dropped += len(more)
    if data:
        yield 0, data.count(b"\n"), len(data) + dropped, data


def paragraphs(stream: IO[bytes], longest: int) -> Iterator[TextPiece]:
    """(blank lines before, lines, bytes read, text) of every paragraph; of the end without one, too."""
    held: list[bytes] = []
    kept = size = lines = blank = 0
    while data := stream.readline(longest + 2):
        size += len(data)
        if not data.endswith(b"\n"):
            size += drop_line(stream)
        lines += 1
        if data.isspace():
            if not held:
                blank += 1
                continue
            yield blank, lines, size, b"".join(held).rstrip(b"\r\n")
            held, kept, size, lines, blank = [], 0, 0, 0, 0
            continue
        if kept <= longest:
            held.append(data)
        kept += len(data)
    if size:
        yield blank, lines, size, b"".join(held).rstrip(b"\r\n")
