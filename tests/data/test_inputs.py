"""The same records come out of every kind of file, whole, in shards, and from the middle on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.data.preparing.inputs import find_inputs, part_of, plan_inputs, read_batches
from megatron_lite.data.preparing.parts import InputPlace
from megatron_lite.data.preparing.records import Reader
from tests.support.extras import needs

RECORDS: list[dict[str, Any]] = [
    {"text": f'text {n} 你好 😀 \n\t"quoted" \\ [x, {{y}}]\u2028' * (n % 5), "n": n}
    for n in range(60)
]
TEXTS = [record["text"] for record in RECORDS]


def texts_from(
    paths: list[Path], batch_bytes: int = 700, start: InputPlace | None = None
) -> list[str]:
    parts = plan_inputs([str(path) for path in paths])
    reader = Reader()
    batches = read_batches(parts, batch_bytes, start=start, columns=["text"])
    return [text for batch in batches for text in reader.parse(batch).keys[0].texts]


def lines(records: list[dict[str, Any]], ascii_only: bool = False) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=ascii_only) + "\n" for r in records).encode()


def write(path: Path, kind: str) -> Path:
    """The records as a file of the kind."""
    if kind == "parquet":
        arrow = needs("pyarrow")
        parquet = needs("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(RECORDS), path, row_group_size=17)
        return path
    content = {
        "jsonl": lambda: lines(RECORDS),
        "jsonl.gz": lambda: gzip.compress(lines(RECORDS[:9])) + gzip.compress(lines(RECORDS[9:])),
        "bom": lambda: b"\xef\xbb\xbf" + lines(RECORDS),
        "crlf": lambda: b"\n\r\n" + lines(RECORDS, True).replace(b"\n", b"\r\n") + b"   ",
        "no-end": lambda: lines(RECORDS).rstrip(b"\n"),
        "array": lambda: json.dumps(RECORDS).encode(),
        "pretty": lambda: b"\xef\xbb\xbf\n " + json.dumps(RECORDS, indent=2).encode() + b"\n\n",
        "pretty-unicode": lambda: json.dumps(RECORDS, indent="\t", ensure_ascii=False).encode(),
        "array.json.gz": lambda: gzip.compress(json.dumps(RECORDS, indent=1).encode()),
    }
    if kind == "jsonl.zst":
        zstandard = needs("zstandard")
        pack = zstandard.ZstdCompressor().compress
        path.write_bytes(pack(lines(RECORDS[:9])) + pack(lines(RECORDS[9:])))
    else:
        path.write_bytes(content[kind]())
    return path


KINDS = {
    "jsonl": "a.jsonl", "jsonl.gz": "a.jsonl.gz", "jsonl.zst": "a.json.zst", "bom": "a.json",
    "crlf": "a.json", "no-end": "a.json", "array": "a.json", "pretty": "a.json",
    "pretty-unicode": "a.json", "array.json.gz": "a.json.gz", "parquet": "a.parquet",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_texts_from_any_place_on(
    tmp_path: Path, kind: str
) -> None:
    path = write(tmp_path / KINDS[kind], kind)
    for batch_bytes in (1, 100, 700, 1 << 20):
        assert texts_from([path], batch_bytes) == TEXTS
    parts = plan_inputs([str(path), str(path)])
    batches = list(read_batches(parts, 300, columns=["text"]))
    assert sum(batch.read for batch in batches) == 2 * path.stat().st_size
    reader = Reader()
    before: list[str] = []
    for batch in batches:
        before += reader.parse(batch).keys[0].texts
        after = texts_from([path, path], 300, start=batch.next)
        assert before + after == TEXTS * 2


@settings(max_examples=40, deadline=None)
@given(
    shards=st.integers(1, 9),
    batch_bytes=st.integers(1, 3000),
    cut=st.integers(1, 59),
)
def test_shards_together_are_the_whole_in_order(
    tmp_path_factory: pytest.TempPathFactory, shards: int, batch_bytes: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "a.jsonl").write_bytes(lines(RECORDS[:cut]))
    (folder / "b.json").write_bytes(json.dumps(RECORDS[cut:]).encode())
    (folder / "c.jsonl").write_bytes(lines(RECORDS).rstrip(b"\n"))
    paths = [str(folder / name) for name in ("a.jsonl", "b.json", "c.jsonl")]
    reader, found = Reader(), []
    for index in range(1, shards + 1):
        parts = plan_inputs(paths, (index, shards))
        for batch in read_batches(parts, batch_bytes):
            parsed = reader.parse(batch)
            found += parsed.keys[0].texts
            if not batch.path.endswith("b.json"):
                for line, text in zip(parsed.lines, parsed.keys[0].texts, strict=True):
                    number = int(batch.where(line).rsplit(":", 1)[1]) - 1
                    assert (
                        text
                        == (RECORDS[:cut] if "a.jsonl" in batch.path else RECORDS)[number]["text"]
                    )
    assert found == TEXTS + TEXTS


def test_array_elements_carry_the_line_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n[\n {"text": "a"},\n\n {"text":\n "b"}, {"txt": "c"}]\n')
    (batch,) = read_batches(plan_inputs([str(path)]), 1 << 20)
    assert [batch.where(n) for n in range(3)] == [f"{path}:{n}" for n in (3, 5, 6)]
    with pytest.raises(DataError, match=r"a\.json:6: no key 'text', it has \['txt'\]"):
        Reader().parse(batch)


BROKEN_ARRAYS = {
    "cut off": ('[\n{"text": "a"},\n{"text": "b', r":3: no JSON"),
    "no comma": ('[\n{"text": "a"}\n{"text": "b"}]', r":3: no comma between"),
    "no end": ('[\n{"text": "a"}', r":2: no comma between two elements, or the array does"),
    "broken": ('[\n{"text": "a"},\n{text: 1}, ' + '{"text": "b"}, ' * 100 + "]", r":3: no JSON"),
    "more": ('[{"text": "a"}]\n{"text": "b"}', r":2: something follows"),
    "deep": ("[" * 100_000, r":1: no JSON"),
}


@pytest.mark.parametrize("case", BROKEN_ARRAYS)
@pytest.mark.parametrize("batch_bytes", [3, 1 << 20])
def test_a_broken_array_is_named_with_its_line(tmp_path: Path, case: str, batch_bytes: int) -> None:
    text, message = BROKEN_ARRAYS[case]
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"a\.json" + message):
        list(read_batches(plan_inputs([str(path)]), batch_bytes))


def test_an_array_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[\n{"text": "\xff"}]')
    with pytest.raises(DataError, match=r"a\.json:.: no UTF-8"):
        list(read_batches(plan_inputs([str(path)]), 100))


def test_files_globs_and_folders_are_found_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "sub/c.json.gz", "sub/d.txt", "wiki_00", ".hidden.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [
        str(Path(found).relative_to(tmp_path))
        for found in find_inputs(
            [str(tmp_path / "wiki_*"), str(tmp_path), str(tmp_path / "*.json")]
        )
    ]
    assert names == ["wiki_00", "a.json", "b.jsonl", "sub/c.json.gz", "a.json"]
    (tmp_path / "texts").mkdir()
    for name in ("b.txt", "a.csv", "c.tsv.gz", "d.rst"):
        (tmp_path / "texts" / name).touch()
    found = find_inputs([str(tmp_path / "texts")])  # no records are there
    assert [Path(name).name for name in found] == ["a.csv", "b.txt", "c.tsv.gz"]
    (tmp_path / "shouted").mkdir()
    (tmp_path / "shouted" / "A.JSONL.GZ").touch()
    assert len(find_inputs([str(tmp_path / "shouted")])) == 1
    (tmp_path / "empty").mkdir()
    for wrong, message in [
        (str(tmp_path / "no*"), "does not exist"),
        (str(tmp_path / "empty"), "is a folder without .json"),
        ("/dev/null", "is no file"),
    ]:
        with pytest.raises(DataError, match=message):
            find_inputs([wrong])


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("A.TXT", "text", "text"),
        ("A.CSV", "text\n", "table"),
        ("wiki_00", '{"text": "a"}', "lines"),
        ("a.jsonl", "no JSON", "lines"),  # a bad line, which --on-bad-line may skip
        ("empty.md", "", "lines"),
    ],
)
def test_what_a_file_is_follows_from_name_and_content(
    tmp_path: Path, name: str, content: str, kind: str
) -> None:
    (tmp_path / name).write_text(content)
    assert part_of(str(tmp_path / name)).kind == kind


def test_text_of_another_name_is_refused_with_the_flag_that_reads_it(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# Notes\n")
    with pytest.raises(DataError, match="notes.md holds no JSON .* --text-unit file, line or para"):
        part_of(str(tmp_path / "notes.md"))
    assert part_of(str(tmp_path / "notes.md"), "line").kind == "lines"


@pytest.mark.parametrize("suffix, package", [("parquet", "pyarrow"), ("json.zst", "zstandard")])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, package: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes({"parquet": b"PAR1", "json.zst": b"\x28\xb5\x2f\xfd"}[suffix])
    with pytest.raises(ConfigError, match=rf"`{package}`: pip install -e '\.\["):
        list(read_batches(plan_inputs([str(path)]), 100))
