"""Damage in a packed or columnar file is found, told with its offset, and costs no memory."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.config.errors import DataError
from megatron_lite.data.preparing.inputs import plan_inputs, read_batches
from megatron_lite.data.preparing.parts import RecordBatch, TextUnit
from megatron_lite.data.preparing.records import Reader
from tests.support.extras import needs

TEXTS = [f"text {n} " + random.Random(n).randbytes(40).hex() for n in range(300)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def zstandard(data: bytes) -> bytes:
    package = needs("zstandard")
    # with its checksum, as the zst command writes
    packed: bytes = package.ZstdCompressor(write_checksum=True).compress(data)
    return packed


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "zst": zstandard, "bz2": bz2.compress, "xz": lzma.compress,
}  # fmt: skip


def parquet() -> bytes:
    arrow = needs("pyarrow")
    pages = needs("pyarrow.parquet")
    file = io.BytesIO()
    pages.write_table(arrow.table({"text": TEXTS, "n": list(range(len(TEXTS)))}), file,
                      row_group_size=100, write_page_checksum=True)  # fmt: skip
    return file.getvalue()


def texts_of(path: Path, unit: TextUnit | None = None) -> list[str]:
    batches = read_batches(plan_inputs([str(path)], unit=unit), 2000, columns=["text"])
    return [text for batch in batches for text in Reader().parse(batch).keys[0].texts]


def offset_of(path: Path) -> int:
    """Where the damage is told to be; the message has the file and its size, too."""
    with pytest.raises(DataError) as raised:
        texts_of(path)
    told = re.search(r"at byte (\d+) of (\d+) - the file is damaged", str(raised.value))
    assert told is not None and str(path) in str(raised.value), raised.value
    assert int(told[2]) == path.stat().st_size
    return int(told[1])


@pytest.mark.parametrize("kind", PACK)
def test_a_packed_file_cut_off_anywhere_is_never_a_shorter_one(tmp_path: Path, kind: str) -> None:
    frames = [PACK[kind](LINES[: len(LINES) // 2]), PACK[kind](LINES[len(LINES) // 2 :])]
    whole, path = b"".join(frames), tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(whole)
    assert texts_of(path) == TEXTS
    for size in (0, 1, 3, 4, 9, 100, len(frames[0]) + 5, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert offset_of(path) <= size
    path.write_bytes(whole[:2])  # of the first bytes that name the packing
    assert offset_of(path) == 2


@pytest.mark.parametrize("kind", PACK)
def test_a_flipped_or_foreign_byte_in_a_packed_file_is_told(tmp_path: Path, kind: str) -> None:
    whole, path = PACK[kind](LINES), tmp_path / f"a.jsonl.{kind}"
    for at in (len(whole) // 3, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert offset_of(path) <= len(whole)
    path.write_bytes(whole + b"rubbish behind")
    assert offset_of(path) == len(whole)
    path.write_bytes(b"not packed at all")
    assert offset_of(path) == 0


def test_zeros_behind_the_last_frame_are_padding(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(LINES) + bytes(9000))
    assert texts_of(path) == TEXTS


@pytest.mark.parametrize("kind", [*PACK, "parquet"])
def test_first_bytes_decide_whatever_the_name(tmp_path: Path, kind: str) -> None:
    content = parquet() if kind == "parquet" else PACK[kind](LINES)
    for name in ("a.jsonl", "a", "a.json.gz", "a.zst"):
        (tmp_path / name).write_bytes(content)
        assert texts_of(tmp_path / name) == TEXTS
        (part,) = plan_inputs([str(tmp_path / name)], (1, 1))
        assert part.end is None  # is not cut as plain lines are


def test_parquet_cut_off_anywhere_or_with_a_flipped_page_is_told(tmp_path: Path) -> None:
    whole, path = parquet(), tmp_path / "a.parquet"
    for size in (0, 3, 4, 12, 100, len(whole) // 2, len(whole) - 5, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert offset_of(path) in (0, size)
    found = 0
    for at in range(8, len(whole) - 8, len(whole) // 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            assert texts_of(path) == TEXTS  # a byte that nobody reads, such as a statistic
        except DataError as error:
            assert "a.parquet cannot be read: broken Parquet" in str(error), error
            assert re.search(r"at byte \d+ of", str(error))
            found += 1
    assert found > 20


@pytest.mark.parametrize(
    "content, what",
    [
        (b"PK\x03\x04" + bytes(30), "a zip archive - unpack it"),
        (bytes(257) + b"ustar\x0000", "a tar archive"),
        (b"ARROW1\x00\x00", "an Arrow file - write it as Parquet"),
        (b"MMIDIDX\x00\x00\x01", "tokenized already"),
        ('{"text": "a"}\n'.encode("utf-16"), "UTF-16 text - write it as UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_by_its_name(tmp_path: Path, content: bytes, what: str) -> None:
    for name, data in (("a.jsonl", content), ("a.jsonl.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=what):
            plan_inputs([str(tmp_path / name)])


LONG = b"x" * (12 << 20)
LIMIT = 1 << 18
TOO_LONG: dict[str, tuple[str, bytes, TextUnit | None]] = {
    "line": ("a.jsonl", b'{"text": "a"}\n{"text": "' + LONG + b'"}\n{"text": "b"}\n', None),
    "last line": ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": "' + LONG, None),
    "packed line": ("a.jsonl.gz", gzip.compress(
        b'{"text": "a"}\n{"text": "' + LONG + b'"}\n{"text": "b"}\n', 1), None),
    "row": ("a.csv", b'text,n\na,1\n"' + LONG + b'",2\nb,3\n', None),
    "text line": ("a.txt", b"a\n" + LONG + b"\nb\n", "line"),
    "paragraph": ("a.txt", b"a\n\n" + LONG + b"\n\nb\n", "paragraph"),
    "paragraph of lines": ("a.txt", b"a\n\n" + (b"x" * 9999 + b"\n") * 600 + b"\nb\n", "paragraph"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_LONG)
def test_what_is_longer_than_allowed_is_told_in_bounded_memory(tmp_path: Path, case: str) -> None:
    name, content, unit = TOO_LONG[case]
    path = tmp_path / name
    path.write_bytes(content)

    def read(reader: Reader) -> tuple[list[str], int]:
        parts = plan_inputs([str(path)], unit=unit)
        texts, skipped = [], 0
        for batch in read_batches(parts, 1 << 16, longest=LIMIT):
            parsed = reader.parse(batch)
            texts += parsed.keys[0].texts
            skipped += parsed.skipped["line too long"]
        return texts, skipped

    tracemalloc.start()
    try:
        assert read(Reader(on_bad_line="skip", longest=LIMIT)) == (["a", "b"], 1)
        with pytest.raises(DataError, match=r"a\..*:\d+: longer than 262144 bytes.*-line-mb 0.25 "):
            read(Reader(longest=LIMIT))
        assert tracemalloc.get_traced_memory()[1] < 32 * LIMIT
    finally:
        tracemalloc.stop()


def test_an_element_of_an_array_is_bounded_too(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "a"},\n{"text": "' + LONG + b'"}]')
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a\.json:2: longer than 262144 bytes"):
            list(read_batches(plan_inputs([str(path)]), 1 << 16, longest=LIMIT))
        assert tracemalloc.get_traced_memory()[1] < 24 * LIMIT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("over", [0, 1])
def test_a_line_of_exactly_the_limit_is_no_longer(tmp_path: Path, over: int) -> None:
    line = json.dumps({"text": "x" * 1000}).encode()
    path = tmp_path / "a.jsonl"
    for content in (line, line + b"\n", line + b"\r\n", b"\n" + line + b"\n" + line):
        path.write_bytes(content)
        for batch_bytes in (1, 500, 1 << 16):
            reader = Reader(on_bad_line="skip", longest=len(line) + 1 - over * 2)
            batches: list[RecordBatch] = list(
                read_batches(
                    plan_inputs([str(path)]), batch_bytes, longest=len(line) + 1 - over * 2
                )
            )
            parsed = [reader.parse(batch) for batch in batches]
            count = content.count(b"x" * 1000)
            assert sum(len(one.lines) for one in parsed) == (0 if over else count)
            assert sum(one.skipped["line too long"] for one in parsed) == (count if over else 0)
            assert batches[-1].next.position == len(content)


UNITS: list[tuple[str, bytes, TextUnit | None, list[str]]] = [
    ("a.txt", b"\xef\xbb\xbfone\r\ntwo\n\nthree", None, ["one\ntwo\n\nthree"]),
    ("a.txt", b"one\r\ntwo\n\n \nthree", "line", ["one", "two", "three"]),
    ("a.txt", b"\n\none\r\ntwo\n\n \nthree\n\n", "paragraph", ["one\ntwo", "three"]),
    ("a.txt.gz", gzip.compress("é\n\nü".encode()), "paragraph", ["é", "ü"]),
    ("a.md", b"one\n\ntwo\n", "file", ["one\n\ntwo\n"]),
    ("a.txt", b'{"text": "one"}\n{"text": "two"}\n', None, ["one", "two"]),
    ("a.txt", b'{"text": "one"}\n', "line", ['{"text": "one"}']),
    ("a.txt", b"[1] a reference", None, ["[1] a reference"]),
    ("a.csv", b'\xef\xbb\xbfn,text\r\n1,"one, ""1""\nand"\r\n\r\n2,two\r\n', None,
     ['one, "1"\nand', "two"]),
    ("a.tsv", b"text\tn\na, b\t1\n", None, ["a, b"]),
    ("a.csv.gz", gzip.compress(b"text\none\n"), None, ["one"]),
]  # fmt: skip


@pytest.mark.parametrize("name, content, unit, expected", UNITS)
def test_texts_and_tables_become_documents(
    tmp_path: Path, name: str, content: bytes, unit: TextUnit | None, expected: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    parts = plan_inputs([str(path)] * 2, unit=unit)
    for batch_bytes in (1, 1 << 16):
        before: list[str] = []
        for batch in read_batches(parts, batch_bytes):
            before += Reader().parse(batch).keys[0].texts
            rest = read_batches(parts, batch_bytes, start=batch.next)
            after = [text for one in rest for text in Reader().parse(one).keys[0].texts]
            assert before + after == expected * 2


BAD_ROWS = [
    ("a.csv", b"text,n\none,1\ntwo\n", None, r"a\.csv:3: 1 fields, the header has 2"),
    ("a.csv", b'text\n"one\n', None, r"a\.csv:2: no CSV \(unexpected end of data"),
    ("a.csv", b'text\n"o"ne\n', None, r"a\.csv:2: no CSV"),
    ("a.csv", b"text\n\xff\n", None, r"a\.csv:2: no UTF-8"),
    ("a.csv", b"text,text\n", None, r"a\.csv:1: the header names a column twice"),
    ("a.csv", b"text;n\none;1\n", None, r"a\.csv:2: no key 'text', it has \['text;n'\]"),
    ("a.txt", b"one\n\xff\n", None, r"a\.txt:1: no UTF-8"),
    ("a.txt", b"one\n\xff\n", "line", r"a\.txt:2: no UTF-8"),
    ("a.txt", b"one\n\n\xff\n", "paragraph", r"a\.txt:3: no UTF-8"),
]


@pytest.mark.parametrize("name, content, unit, message", BAD_ROWS)
def test_a_bad_row_or_text_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, unit: TextUnit | None, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path / name, unit)
