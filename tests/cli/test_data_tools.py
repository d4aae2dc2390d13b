"""The tools that look at data end with the right code and say what there is."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_lite.cli import (
    build_index,
    check_dataset,
    convert_flat,
    dataset_stats,
    merge_datasets,
)
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.exit import run_tool
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.preparing.flat import document_lengths
from tests.support.corpora import write_pair
from tests.support.extras import needs


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> Path:
    return Path(write_pair(prefix, documents, dtype))


def run(tool: ModuleType, *arguments: object) -> int:
    words = [str(argument) for argument in arguments]
    return run_tool(lambda: int(tool.main(words)), argv=words)


def test_a_good_pair_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "a", [[1, 2, 9], [], [3, 9], [4]])
    assert run(check_dataset, prefix, "--eod", 9, "--vocab-size", 10) == 0
    assert capsys.readouterr().out == (
        f"{prefix}: good: 4 documents (1 empty), 4 sequences, 6 tokens of uint16, ids 1 to 9, "
        "2 documents end with the EOD\n"
    )


def test_every_bad_pair_of_several_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, high, short = (write(tmp_path / name, [[1, 2], [7, 3]]) for name in ("g", "h", "s"))
    write(high, [[1, 2], [70, 3]])
    Path(f"{short}.bin").write_bytes(b"123")
    assert run(check_dataset, good, high, short, "--vocab-size", 50) == 3
    said = capsys.readouterr()
    assert f"{good}: good" in said.out
    assert "h.bin: token 2 (sequence 1) is 70, not below the vocabulary's 50" in said.err
    assert "s.bin has 3 bytes, expected 8" in said.err


def test_hashes_find_any_flipped_bit(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, 2, 9], [3, 9], [4, 5, 6]] * 20)
    originals = {kind: Path(f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx")}
    hashes = {kind: hashlib.sha256(data).hexdigest() for kind, data in originals.items()}
    Path(f"{prefix}.meta.json").write_text(json.dumps({"sha256": hashes}))
    assert run(check_dataset, prefix) == 0
    random = np.random.default_rng(0)
    for flip in range(100):
        kind = ("bin", "idx")[flip % 2]
        data = bytearray(originals[kind])
        data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
        Path(f"{prefix}.{kind}").write_bytes(data)
        assert run(check_dataset, prefix) == 3
        Path(f"{prefix}.{kind}").write_bytes(originals[kind])


def test_a_repaired_pair_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "a", [[11, 12, 13], [21, 22]])
    tokens = np.array([11, 12, 13, 9, 21, 22, 9], np.uint16)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    assert run(check_dataset, prefix) == 3
    assert "--append-eod writes such pairs" in capsys.readouterr().err
    assert run(check_dataset, prefix, "--repair", tmp_path / "b") == 0
    assert "every document ends with token 9" in capsys.readouterr().out
    assert [s.tolist() for s in IndexedDataset(tmp_path / "b")[:]] == [[11, 12, 13, 9], [21, 22, 9]]
    assert run(check_dataset, prefix, "--repair", prefix) == 3


def test_merging_keeps_every_document_in_order(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for number in (1, 2, 10):
        write(tmp_path / "shards" / f"s{number}", [[number, k] for k in range(number % 4)])
    out = tmp_path / "all"
    assert run(merge_datasets, "--input", tmp_path / "shards", "--output-prefix", out) == 0
    found = [sequence.tolist() for sequence in IndexedDataset(out)[:]]
    assert found == [[1, 0], [2, 0], [2, 1], [10, 0], [10, 1]]
    assert IndexedDataset(out).document_indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert run(merge_datasets, "--input", tmp_path / "shards", "--output-prefix", out) == 2
    wide = write(tmp_path / "wide", [[1]], np.int32)
    again = ("--input", out, wide, "--output-prefix", tmp_path / "both")
    assert run(merge_datasets, *again) == 3
    assert not (tmp_path / "both.idx").exists()


def test_flat_files_become_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.array([5, 6, 0, 0, 7, 0, 8, 8], np.uint16)
    (tmp_path / "train.bin").write_bytes(tokens.tobytes())
    expected = [[5, 6, 0], [0], [7, 0], [8, 8]]
    assert run(convert_flat, tmp_path / "train.bin", "--eod", 0) == 0
    assert [s.tolist() for s in IndexedDataset(tmp_path / "train")[:]] == expected
    assert "4 documents, 8 tokens of uint16, 3 end with token 0" in capsys.readouterr().out
    assert (tmp_path / "train.bin").read_bytes() == tokens.tobytes()
    copied = ("--output-prefix", tmp_path / "copy")
    assert run(convert_flat, tmp_path / "train.bin", "--eod", 0, *copied) == 0
    assert [s.tolist() for s in IndexedDataset(tmp_path / "copy")[:]] == expected
    assert run(convert_flat, tmp_path / "train.bin", "--eod", 0) == 2
    (tmp_path / "odd.bin").write_bytes(b"123")
    assert run(convert_flat, tmp_path / "odd.bin", "--eod", 0) == 3


def test_flat_documents_cross_the_pieces_they_are_read_in(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 6, 1000).astype(np.uint16)
    whole = document_lengths(tokens, 3)
    monkeypatch.setattr("megatron_lite.data.preparing.flat._CHUNK", 7)
    assert document_lengths(tokens, 3).tolist() == whole.tolist()
    assert whole.sum() == 1000 and np.all(tokens[np.cumsum(whole)[:-1] - 1] == 3)


def test_statistics_count_and_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "a", [[4] * 10, [4, 4, 5], [], [6]])
    png = tmp_path / "lengths.png"
    words = [str(prefix), "--top", "2", "--samples", "4"]
    assert run(dataset_stats, *words) == 0
    said = capsys.readouterr().out
    assert "4 documents (1 empty), 4 sequences, 14 tokens of uint16" in said
    assert "85.714%" in said and "document 1 (3 tokens): 4 4 5" in said
    needs("matplotlib")
    assert run(dataset_stats, *words, "--plot", str(png)) == 0
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_token_counter_says_what_a_blend_reads_of_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a", [[4] * 10, [4, 4], []])
    b = write(tmp_path / "b", [[4] * 30])
    assert run(dataset_stats, "--table", 3, a, 1, b, "--tokens", 80) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["dataset", "documents", "tokens", "bytes", "weight", "tokens", "taken", "epochs"],
        [str(a), "3", "12", "24", "0.7500", "60", "5.000"],
        [str(b), "1", "30", "60", "0.2500", "20", "0.667"],
        ["all", "4", "42", "84", "1.0000", "80", "1.905"],
    ]
    assert run(dataset_stats, "--table", a, b) == 0  # without weights each is read once
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-1] for row in rows[1:]] == ["1.000"] * 3
    assert run(dataset_stats, a, "--tokens", 80) == run(dataset_stats, "--table", 3, a, b) == 2


def test_a_million_documents_are_counted_in_a_second(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = np.full(1_000_000, 700, np.int32)
    prefix = tmp_path / "large"
    pointers = np.arange(0, 1_000_000 * 1400, 1400, dtype=np.int64)
    header = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + bytes([8])
    counts = np.array([1_000_000, 1_000_001], "<u8").tobytes()
    index = header + counts + lengths.tobytes() + pointers.tobytes()
    Path(f"{prefix}.idx").write_bytes(index + np.arange(1_000_001, dtype=np.int64).tobytes())
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(1_400_000_000)  # a hole: nothing of it is read
    began = time.process_time()
    assert run(dataset_stats, "--table", prefix, "--tokens", 1_400_000_000) == 0
    assert time.process_time() - began < 1
    assert "1,000,000  700,000,000  1,400,000,000  1.0000  1,400,000,000   2.000" in (
        capsys.readouterr().out
    )


def test_frequencies_of_a_part_are_read_from_all_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_stats, "_PIECE", 10)
    ds = IndexedDataset(write(tmp_path / "a", [[k // 10] * 10 for k in range(0, 100, 10)]))
    counts, read = dataset_stats.frequencies(ds, 1000)
    assert read == 100 and counts.tolist() == [10] * 10
    counts, read = dataset_stats.frequencies(ds, 50)
    assert read == 50 and np.flatnonzero(counts).tolist() == [0, 2, 4, 6, 8]


def test_the_index_is_built_offline_and_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a", [[k % 50] * 30 for k in range(200)])
    flags = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 "
        "--max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 4 --train-iters 20 "
        "--lr 1e-3 --eval-iters 1 --tokenizer-type NullTokenizer --vocab-size 60 --split 90,5,5 "
        f"--data-path {a}"
    ).split()
    assert run(build_index, *flags, "--data-cache-path", tmp_path / "cache") == 0
    said = capsys.readouterr().out
    assert "train data" in said and "ready after" in said
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(files) == 6  # arrays and description of three splits
    assert run(build_index, *flags, "--data-cache-path", tmp_path / "cache") == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == files
    with pytest.raises(ConfigError, match="--data-cache-path or --save"):
        build_index.main(flags)


def llm_c(magic: int, version: int, tokens: np.ndarray, count: int | None = None) -> bytes:
    """A token file as llm.c writes it."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.tobytes()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gpt-2", lambda t: llm_c(20240520, 1, t.astype("<u2")), "llm.c's header of 1024 bytes"),
        ("llama 3", lambda t: llm_c(20240801, 7, t.astype("<u4")), "uint32 follows"),
        ("numpy", lambda t: npy(t.astype("<u2")), "numpy's header of 128 bytes"),
    ],
)
def test_a_known_header_is_left_out_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content, words: str
) -> None:
    tokens = np.array([5, 6, 0, 0, 7, 0, 8, 8])
    (tmp_path / "train.bin").write_bytes(content(tokens))
    assert run(convert_flat, tmp_path / "train.bin", "--eod", 0) == 3
    assert "are no tokens: give --output-prefix" in capsys.readouterr().err
    out = tmp_path / "out"
    assert run(convert_flat, tmp_path / "train.bin", "--eod", 0, "--output-prefix", out) == 0
    assert words in capsys.readouterr().out
    assert [s.tolist() for s in IndexedDataset(out)[:]] == [[5, 6, 0], [0], [7, 0], [8, 8]]


def npy(tokens: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, tokens)
    return file.getvalue()


SHORT = np.arange(1, 41, dtype=np.uint16)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (llm_c(20240520, 1, SHORT, count=50), "says 50 tokens of uint16"),
        (llm_c(20240520, 2, SHORT), "version 2, read is version 1"),
        (llm_c(20240522, 1, SHORT), "an evaluation file of llm.c"),
        (npy(np.zeros((2, 3), np.uint16)), "the shape [2, 3]"),
        (npy(SHORT.astype(np.float32)), "float32"),
        (npy(SHORT)[:-4], "damaged .npy"),
        (gzip.compress(SHORT.tobytes() * 9), "a gzip file"),
        (b"PAR1" + bytes(200), "a Parquet file"),
        (b'{"text": "The quick brown fox jumps over the lazy dog, again and again"}\n', "is text"),
        ("他们说了很多次，他们说了很多次，他们说了很多次，他们说了很多次。".encode(), "is text"),
        (b"\x80\x04\x95" + bytes(99), "a pickle"),
        (b"MMIDIDX\x00\x00" + bytes(99), "an index of token files"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_row_of_tokens_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    (tmp_path / "x.bin").write_bytes(content + b" " * (len(content) % 2))
    assert run(convert_flat, tmp_path / "x.bin", "--eod", 0, "--output-prefix", tmp_path / "o") == 3
    assert said in capsys.readouterr().err


def test_tokens_that_look_like_a_short_magic_are_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = np.frombuffer(b"\x1f\x8b\x09\x00\xff\xfe\x01\x00" * 20, "<u2")
    (tmp_path / "x.bin").write_bytes(tokens.tobytes())
    assert run(convert_flat, tmp_path / "x.bin", "--eod", 77) == 0
    assert "token 77 stands nowhere at an end" in capsys.readouterr().err
