"""Bad input, one row each: the exit code, the file or flag by name, the way out, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_lite.cli import preprocess_data, pretrain_gpt
from megatron_lite.config.exit import run_tool
from tests.faults.pairs import NULL, pair
from tests.support.launch import LAUNCHER_NAMES, TINY, WITHOUT_DATA
from tests.support.sizes import with_flags
from tests.train.runs import HANDLED


@dataclass(frozen=True)
class Row:
    """What is wrong: `make` prepares a folder and gives the flags; what must come of it.

    words: each must be in the FATAL line; {folder} stands for the folder.
    """

    make: Callable[[Path], list[str]]
    code: int
    words: list[str]
    env: dict[str, str] = field(default_factory=dict)


def flags(*words: str) -> Callable[[Path], list[str]]:
    return lambda folder: list(words)


def data(change: Callable[[Path], object], *more: str) -> Callable[[Path], list[str]]:
    """Flags that train on a pair to which something was done."""

    def make(folder: Path) -> list[str]:
        prefix = pair(folder)
        change(folder)
        return ["--data-path", str(prefix), "--split", "100,0,0", *more]

    return make


def overwrite(path: Path, at: int, new: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(new)


def beyond_the_vocabulary(folder: Path) -> list[str]:
    documents = [[1, 2, 3, 4711] * 10 for _ in range(40)]
    return ["--data-path", str(pair(folder, *documents)), "--split", "100,0,0"]


def flipped_bit(folder: Path) -> list[str]:
    """A bit that leaves the id inside the vocabulary: only the recorded hash can tell."""
    prefix = pair(folder, *([[1, 2, 3] * 10] * 40))
    hashes = {
        kind: hashlib.sha256(Path(f"{prefix}.{kind}").read_bytes()).hexdigest()
        for kind in ("bin", "idx")
    }
    Path(f"{prefix}.meta.json").write_text(json.dumps({"sha256": hashes}))
    overwrite(folder / "d.bin", 100, b"\x00")
    return ["--data-path", str(prefix), "--split", "100,0,0", "--verify-data"]


def another_tokenizer(folder: Path) -> list[str]:
    """Tokens whose ids all fit, of a tokenizer that is not the run's."""
    prefix = pair(folder)
    made = {"type": "GPT2BPETokenizer", "fingerprint": "0123456789abcdef", "vocab_size": 61}
    Path(f"{prefix}.meta.json").write_text(json.dumps({"tokenizer": made}))
    return ["--data-path", str(prefix), "--split", "100,0,0"]


def three_documents(folder: Path) -> list[str]:
    prefix = pair(folder, *([[1, 2, 3] * 20] * 3))
    return ["--data-path", str(prefix), "--split", "1,50,949", "--eval-iters", "1"]


def too_few_tokens(folder: Path) -> list[str]:
    return ["--data-path", str(pair(folder, [], [])), "--split", "100,0,0"]


HEADS = ["--tensor-model-parallel-size", "3", "--world-size", "3", "--dry-run"]
LAYERS = ["--pipeline-model-parallel-size", "4", "--world-size", "4", "--dry-run"]
BATCH = ["--world-size", "4", "--dry-run", "--global-batch-size", "10"]

TRAINING: dict[str, Row] = {
    "data missing": Row(
        lambda folder: ["--data-path", str(folder / "no")], 3, ["{folder}/no", "prefix"]
    ),
    "index missing": Row(data(lambda f: os.remove(f / "d.idx")), 3, ["{folder}/d", "prefix"]),
    "tokens missing": Row(data(lambda f: os.remove(f / "d.bin")), 3, ["{folder}/d.bin", "not on this machine"]),
    "truncated by a byte": Row(
        data(lambda f: os.truncate(f / "d.bin", 2399)), 3,
        ["{folder}/d.bin", "2399 bytes, expected 2400"],
    ),
    "truncated to nothing": Row(
        data(lambda f: os.truncate(f / "d.bin", 0)), 3, ["{folder}/d.bin", "0 bytes"]
    ),
    "index truncated": Row(
        data(lambda f: os.truncate(f / "d.idx", 100)), 3, ["{folder}/d.idx", "100 bytes"]
    ),
    "wrong magic": Row(
        data(lambda f: overwrite(f / "d.idx", 0, b"TNTIDX")), 3, ["{folder}/d.idx", "MMIDIDX"]
    ),
    "wrong version": Row(
        data(lambda f: overwrite(f / "d.idx", 9, struct.pack("<Q", 9))), 3,
        ["{folder}/d.idx", "version 9"],
    ),
    "a folder in place of the tokens": Row(
        data(lambda f: (os.remove(f / "d.bin"), (f / "d.bin").mkdir())), 3, ["{folder}/d.bin"]
    ),
    "id beyond the vocabulary": Row(
        beyond_the_vocabulary, 3, ["{folder}/d", "token id 4711", "the vocabulary has"]
    ),
    "another tokenizer": Row(
        another_tokenizer, 3,
        ["{folder}/d.meta.json", "GPT2BPETokenizer (61 ids, fingerprint 0123456789ab)",
         "NullTokenizer (62 ids", "--allow-tokenizer-mismatch"],
    ),
    "a flipped bit": Row(flipped_bit, 3, ["{folder}/d.bin", "SHA-256", "copy it again"]),
    "empty split": Row(three_documents, 3, ["{folder}/d", "0 documents", "--split"]),
    "no tokens": Row(too_few_tokens, 3, ["{folder}/d", "no tokens"]),
    "weight 0": Row(flags("--data-path", "0", "a", "1", "b"), 2, ["--data-path", "item 1, '0'"]),
    "weight negative": Row(flags("--data-path", "1", "a", "-2", "b"), 2, ["item 3, '-2'"]),
    "weight nan": Row(flags("--data-path", "nan", "a", "1", "b"), 2, ["item 1, 'nan'"]),
    "weight inf": Row(flags("--data-path", "1", "a", "inf", "b"), 2, ["item 3, 'inf'"]),
    "weight no number": Row(flags("--data-path", "1", "a", "x3", "b"), 2, ["item 3, 'x3'"]),
    "weight without prefix": Row(flags("--data-path", "1", "a", "2"), 2, ["has no prefix"]),
    "prefix twice": Row(flags("--data-path", "1", "a", "2", "a"), 2, ["a is named twice"]),
    "split of words": Row(flags("--split", "most,some,few"), 2, ["--split", "949,50,1"]),
    "world size": Row(flags("--world-size", "4"), 2, ["--world-size 4", "1 processes"]),
    "world size for tp x pp": Row(
        flags("--tensor-model-parallel-size", "2", "--world-size", "3", "--dry-run"), 2,
        ["3", "--tensor-model-parallel-size", "2"],
    ),
    "heads": Row(flags(*HEADS), 2, ["--num-attention-heads 4", "1, 2, 4"]),
    "layers": Row(flags(*LAYERS), 2, ["--num-layers 2", "--pipeline-model-parallel-size 4"]),
    "batch": Row(flags(*BATCH), 2, ["--global-batch-size 10", "8", "16"]),
    "micro batch": Row(flags("--micro-batch-size", "3"), 2, ["--global-batch-size 4", "3"]),
    "hidden size": Row(flags("--hidden-size", "30"), 2, ["--hidden-size 30", "4"]),
    "sequence beyond positions": Row(
        flags("--seq-length", "32"), 2, ["--seq-length 32", "--max-position-embeddings 16"]
    ),
    "unknown flag": Row(flags("--gloal-batch-size", "4"), 2, ["--global-batch-size"]),
    "learning rate": Row(flags("--lr", "-1"), 2, ["--lr"]),
    "no place for checkpoints": Row(flags("--keep-last", "2"), 2, ["--keep-last needs --save"]),
    "no checkpoint to load": Row(
        lambda folder: ["--load", str(folder), "--exit-on-missing-checkpoint"], 4,
        ["--load {folder}", "leave the flag out"],
    ),
    "fault of another world": Row(
        flags(), 2, ["MLITE_FAULT='step1:5:exit'", "no rank of 1"], {"MLITE_FAULT": "step1:5:exit"}
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No launcher's environment, a folder of its own to run in, signal handlers as before."""
    for name in LAUNCHER_NAMES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    handlers = {n: signal.getsignal(n) for n in HANDLED}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def require(row: Row, folder: Path, code: int, err: str) -> None:
    """One FATAL line of the row's code with all its words, and no traceback."""
    assert code == row.code, err[-3000:]
    first = err[err.find("FATAL[") :]
    assert first.startswith(f"FATAL[{row.code}] ") and err.count("FATAL[") == 1, err
    assert "Traceback" not in err
    for word in row.words:
        assert word.replace("{folder}", str(folder)) in first, first


@pytest.mark.parametrize("name", TRAINING)
def test_training(name, tmp_path, monkeypatch, capsys) -> None:
    row = TRAINING[name]
    folder = tmp_path / "data"
    folder.mkdir()
    words = row.make(folder)
    base = WITHOUT_DATA if "--data-path" in words else TINY
    for variable, value in row.env.items():
        monkeypatch.setenv(variable, value)
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *with_flags(base, *words)])
    code = pretrain_gpt.run()
    require(row, folder, code, capsys.readouterr().err)
    assert sorted(path.name for path in folder.iterdir()) == before
    if row.code == 2:
        assert not list(Path.cwd().iterdir()), "nothing was started, so nothing was made"


def lines(*records: object) -> Callable[[Path], list[str]]:
    """A JSON-lines file of these records; text is written as it is."""

    def make(folder: Path) -> list[str]:
        text = "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records)
        (folder / "in.json").write_text(text)
        return ["--input", str(folder / "in.json"), "--output-prefix", str(folder / "out")]

    return make


def existing(folder: Path) -> list[str]:
    (folder / "out_text_document.bin").write_bytes(b"precious")
    return lines({"text": "1 2"})(folder)


def unreadable(folder: Path) -> list[str]:
    made = lines({"text": "1"})(folder)
    os.remove(folder / "in.json")
    (folder / "in.json").mkdir()
    return made


PREPARING: dict[str, Row] = {
    "input missing": Row(
        lambda f: ["--input", str(f / "no.json"), "--output-prefix", str(f / "out")], 3,
        ["{folder}/no.json"],
    ),
    "a folder as input": Row(unreadable, 3, ["{folder}/in.json"]),
    "bad JSON": Row(lines({"text": "1"}, '{"text": \n', {"text": "2"}), 3, ["{folder}/in.json:2"]),
    "a key missing": Row(lines({"text": "1"}, {"txt": "2"}), 3, ["{folder}/in.json:2", "text"]),
    "text is a number": Row(lines({"text": "1"}, {"text": 5}), 3, ["{folder}/in.json:2"]),
    "id beyond the vocabulary": Row(lines({"text": "1"}, {"text": "77"}), 3, ["in.json:2", "77"]),
    "no documents": Row(lines(), 3, ["{folder}/in.json"]),
    "prefix exists": Row(existing, 2, ["{folder}/out_text_document", "--overwrite"]),
    "output folder is a file": Row(
        lambda f: [*lines({"text": "1"})(f)[:-1], str(f / "in.json" / "out")], 5,
        ["{folder}/in.json"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PREPARING)
def test_preparing_data(name, tmp_path, monkeypatch, capsys) -> None:
    row = PREPARING[name]
    folder = tmp_path / "data"
    folder.mkdir()
    words = row.make(folder)
    before = {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *words, *NULL])
    code = run_tool(preprocess_data.main)
    require(row, folder, code, capsys.readouterr().err)
    after = {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}
    assert after == before


PACKAGES = {
    "zstandard": (["--input", "{folder}/in.zst", *NULL], ".[zstd]"),
    "pyarrow": (["--input", "{folder}/in.parquet", *NULL], ".[parquet]"),
    "sentencepiece": (
        ["--input", "{folder}/in.json", "--tokenizer-type", "SentencePieceTokenizer",
         "--tokenizer-model", "{folder}/in.json"], ".[sentencepiece]",
    ),
    "ray": (
        ["--input", "{folder}/in.json", "--engine", "ray", "--shards", "2", *NULL],
        ".[ray]",
    ),
}  # fmt: skip
"""package -> (words that need it, the extra that brings it)"""


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named_with_its_extra(package, tmp_path, monkeypatch, capsys) -> None:
    words, extra = PACKAGES[package]
    lines({"text": "1 2"})(tmp_path)
    content = (tmp_path / "in.json").read_bytes()
    (tmp_path / "in.zst").write_bytes(b"\x28\xb5\x2f\xfd" + content)
    (tmp_path / "in.parquet").write_bytes(b"PAR1" + content + b"PAR1")
    given = [word.replace("{folder}", str(tmp_path)) for word in words]
    out = ["--output-prefix", str(tmp_path / "out"), "--workers", "1"]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *given, *out])
    code = run_tool(preprocess_data.main)
    require(Row(flags(), 2, [package, extra]), tmp_path, code, capsys.readouterr().err)
    assert not list(tmp_path.glob("out*"))
