"""What is read of a corpus: parts of files, batches of whole records, and where reading resumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

InputKind = Literal["lines", "array", "parquet", "table", "text"]
TextUnit = Literal["file", "line", "paragraph"]

BOM = b"\xef\xbb\xbf"
LONGEST_LINE = 256 << 20  # bytes; what --max-line-mb changes


@dataclass(frozen=True, slots=True)
class InputPart:
    """A file to be read: all of it, or of plain lines those that begin in [begin, end).

    unit: what of a text file is a document; None: the file holds records.
    """

    path: str
    kind: InputKind
    begin: int = 0
    end: int | None = None
    packed: bool = False
    unit: TextUnit | None = None


@dataclass(frozen=True, slots=True)
class InputPlace:
    """Where reading resumes: input number; byte, element or row; line number counted so far."""

    part: int = 0
    position: int = 0
    line: int = 1


@dataclass(frozen=True, slots=True)
class NoRecord:
    """Stands where a record should be: a short reason to count by, and the whole story."""

    reason: str
    story: str


InputRecord = dict[str, Any] | NoRecord


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Whole records of one file, as lines or as dicts, and where the next batch begins.

    `line` is the number of the first line (element's line, row) counted from byte `origin`.
    `plain`: the lines are texts themselves, not JSON.
    """

    path: str
    line: int
    next: InputPlace
    read: int  # bytes on disk since the last batch: for the progress bar
    data: bytes = b""
    origin: int = 0
    numbers: tuple[int, ...] | None = None
    records: tuple[InputRecord, ...] | None = None
    plain: bool = False

    def where(self, index: int) -> str:
        """`file:line` of line `index` of this batch; counts the lines before a shard's begin."""
        if self.numbers is not None:
            return f"{self.path}:{self.numbers[index]}"
        before = count_lines(self.path, self.origin) if self.origin else 0
        return f"{self.path}:{before + self.line + index}"


def count_newlines(data: bytes) -> int:
    """Newlines; numpy finds many of them in a third of the time that `bytes.count` takes."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n")))


def count_lines(path: str, end: int) -> int:
    """Newlines in the first `end` bytes."""
    count = 0
    with open(path, "rb") as file:
        while end > 0 and (data := file.read(min(end, 1 << 24))):
            count += count_newlines(data)
            end -= len(data)
    return count


def too_long(longest: int) -> NoRecord:
    """A line, element or cell beyond the limit."""
    return NoRecord(
        "line too long",
        f"longer than {longest} bytes, which --max-line-mb {longest / 2**20:.3g} allows",
    )
