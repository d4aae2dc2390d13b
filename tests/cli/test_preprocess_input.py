"""What the input of tools/preprocess_data.py may be, and one clear line where it may not."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.data.indexed import IndexedDataset
from tests.support.extras import needs
from tests.support.preprocess import NULL, TOOL, call


def test_bom_crlf_blank_lines_and_no_last_newline_are_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_bytes(
        b'\xef\xbb\xbf{"text": "1"}\r\n\n   \n{"text": "2", "x": "\xe2\x80\xa8"}\n{"text": "3"}'
    )
    assert (
        call(monkeypatch, "--input", tmp_path / "*.json", "--output-prefix", tmp_path / "a", *NULL)
        == 0
    )
    ds = IndexedDataset(tmp_path / "a_text_document")
    assert [sequence.tolist() for sequence in ds] == [[1], [2], [3]]


BAD_LINES = {
    "json": (b'{"text": ', "no JSON"),
    "array": (b'["1"]', "a JSON list, not an object"),
    "key": (b'{"txt": "1", "id": 2}', r"no key 'text', it has \['id', 'txt'\]"),
    "null": (b'{"text": null}', "'text' is NoneType"),
    "number": (b'{"text": 5}', "'text' is int"),
    "nested": (b'{"text": [["1"]]}', "'text' is list"),
    "utf8": (b'{"text": "\xff"}', "no UTF-8"),
    "surrogate": (b'{"text": "\\ud800"}', "lone surrogate"),
    "deep": (b"[" * 100_000, "no JSON"),
    "tokenizer": (b'{"text": "one"}', "numbers separated by spaces"),
    "range": (b'{"text": "1000"}', "1000 is not below"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    line, message = BAD_LINES[case]
    (tmp_path / "a.json").write_bytes(b'{"text": "1"}\n' * 3 + line + b"\n" + b'{"text": "2"}\n')
    assert (
        call(monkeypatch, "--input", tmp_path / "a.json", "--output-prefix", tmp_path / "x", *NULL)
        == 3
    )
    err = capsys.readouterr().err
    assert err.startswith("FATAL[3] rank=- step=-: ") and len(err.splitlines()) == 1
    assert "a.json:4: " in err
    assert re.search(message, err)
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_bad_line_in_a_worker_ends_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"text": "1"}\n{"text": \n')
    arguments = ["--input", tmp_path / "a.json", "--output-prefix", tmp_path / "x", *NULL]
    done = subprocess.run(
        [sys.executable, TOOL, *arguments, "--workers", "2"], capture_output=True, text=True
    )
    assert done.returncode == 3
    assert done.stderr.startswith("FATAL[3] ") and "a.json:2: no JSON" in done.stderr
    assert "Traceback" not in done.stderr and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "content, message",
    [(b"", "no documents"), (b"\n\n", "no documents"), (b'{"text": ""}\n' * 2, "have no tokens")],
)
def test_input_without_text_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    message: str,
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert (
        call(monkeypatch, "--input", tmp_path / "a.json", "--output-prefix", tmp_path / "x", *NULL)
        == 3
    )
    assert message in capsys.readouterr().err and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "name, content, extra, message",
    [
        ("a.jsonl.zst", b"(\xb5/\xfd\x04", [], "Zstandard ends in the middle at byte 5 of 5"),
        ("a.jsonl.zst", b'{"text": "1"}\n', [], "no Zstandard (it begins with 7b227465) at byte 0"),
        ("a.jsonl", gzip.compress(b'{"text": "1"}\n')[:-4], [], "gzip ends in the middle at byte"),
        ("a.jsonl", b'{"text": "' + b"1 " * 600 + b'"}\n', ["--max-line-mb", "0.0009765625"],
         "a.jsonl:1: longer than 1024 bytes, which --max-line-mb 0.000977 allows"),
    ],
)  # fmt: skip
def test_input_that_is_damaged_or_too_long_is_a_data_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    extra: list[str],
    message: str,
) -> None:
    if name.endswith(".zst"):
        needs("zstandard")
    (tmp_path / name).write_bytes(content)
    arguments = ("--input", tmp_path / name, "--output-prefix", tmp_path / "x", *NULL, *extra)
    assert call(monkeypatch, *arguments) == 3
    err = capsys.readouterr().err
    assert err.startswith("FATAL[3] ") and message in err and len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == [name]


def test_texts_and_tables_are_tokenized_and_resumed_by_their_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("1 2\n3\n\n4\n")
    (tmp_path / "b.csv").write_text('n,text\n1,"5 6"\n')
    arguments = ["--input", tmp_path / "a.txt", tmp_path / "b.csv", *NULL]
    for unit, expected in {
        None: [[1, 2, 3, 4], [5, 6]],
        "line": [[1, 2], [3], [4], [5, 6]],
        "paragraph": [[1, 2, 3], [4], [5, 6]],
    }.items():
        extra = ["--output-prefix", tmp_path / f"x{unit}", *(["--text-unit", unit] if unit else [])]
        assert call(monkeypatch, *arguments, *extra, "--workers", 1) == 0
        ds = IndexedDataset(tmp_path / f"x{unit}_text_document")
        assert [sequence.tolist() for sequence in ds] == expected
        capsys.readouterr()
        assert call(monkeypatch, *arguments, *extra, "--resume") == 0
        assert "24 bytes, all read before" in capsys.readouterr().out


def test_skipped_lines_are_counted_and_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [line for case, (line, _) in BAD_LINES.items() if case != "deep"]
    (tmp_path / "a.json").write_bytes(b'{"text": "1"}\n' + b"\n".join(bad) + b'\n{"text": "2"}\n')
    for workers in (1, 2):
        prefix = tmp_path / f"x{workers}"
        arguments = ("--input", tmp_path / "a.json", "--output-prefix", prefix, *NULL)
        assert call(
            monkeypatch, *arguments, "--on-bad-line", "skip", "--workers", workers
        ) == 0  # fmt: skip
        ds = IndexedDataset(f"{prefix}_text_document")
        assert [sequence.tolist() for sequence in ds] == [[1], [2]]
        facts = json.loads((tmp_path / f"x{workers}_text_document.meta.json").read_text())
        assert facts["skipped"] == {
            "no JSON": 1, "no object": 1, "key missing": 1, "no text": 3, "no UTF-8": 1,
            "lone surrogate": 1, "refused by the tokenizer": 2,
        }  # fmt: skip
        out = capsys.readouterr().out
        assert "skipped: 10 records (1 key missing, 1 lone surrogate, " in out
