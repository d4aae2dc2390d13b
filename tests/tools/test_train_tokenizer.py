"""The demo's way: corpus, vocabulary, token files; the vocabulary is GPT-2's format."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_lite.config.exit import run_tool
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2BPETokenizer
from tools import demo_corpus, preprocess_data, train_tokenizer

pytest.importorskip("tokenizers", reason="training needs the tokenizers library")


def call(monkeypatch: pytest.MonkeyPatch, tool: object, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    return run_tool(tool.main)  # type: ignore[attr-defined]


def test_vocabulary_is_trained_streaming_and_ends_with_eod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "the quick brown fox jumps over the lazy dog, the fox again; 你好 你好"
    lines = [json.dumps({"text": f"{words} {i % 7}", "b": ["the end"]}) for i in range(50)]
    (tmp_path / "a.json").write_text("\n".join(lines))
    arguments = ("--input", tmp_path / "a.json", "--vocab-size", 300, "--output-dir")
    assert (
        call(monkeypatch, train_tokenizer, *arguments, tmp_path / "v", "--json-keys", "text", "b")
        == 0
    )
    files = str(tmp_path / "v" / "gpt2-vocab.json"), str(tmp_path / "v" / "gpt2-merges.txt")
    vocab = json.loads(Path(files[0]).read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(300)) and vocab["<|endoftext|>"] == 299
    assert Path(files[1]).read_text(encoding="utf-8").startswith("#version: 0.2\n")
    tokenizer = GPT2BPETokenizer(*files)
    assert len(tokenizer.encode(" the")) == 1 and tokenizer.eod == 299
    assert tokenizer.decode(tokenizer.encode(words)) == words
    assert GPT2BPETokenizer(*files, engine="plain").encode(words) == tokenizer.encode(words)
    # the same again gives the same bytes
    assert (
        call(monkeypatch, train_tokenizer, *arguments, tmp_path / "w", "--json-keys", "text", "b")
        == 0
    )
    for name in ("gpt2-vocab.json", "gpt2-merges.txt"):
        assert (tmp_path / "v" / name).read_bytes() == (tmp_path / "w" / name).read_bytes()


def test_too_small_a_vocabulary_and_too_little_text_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text('{"text": "ab ab"}')
    arguments = ("--input", tmp_path / "a.json", "--output-dir", tmp_path, "--vocab-size")
    assert call(monkeypatch, train_tokenizer, *arguments, 256) == 2
    assert "at least 257" in capsys.readouterr().err
    assert call(monkeypatch, train_tokenizer, *arguments, 1000) == 0
    assert "fewer than --vocab-size 1000" in capsys.readouterr().err


def test_the_demo_corpus_becomes_token_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, demo_corpus, tmp_path, "--megabytes", 0.3) == 0
    texts = {}
    for name in ("docs", "code"):
        content = (tmp_path / f"{name}.json").read_bytes()
        assert 200_000 < len(content) <= 300_000
        texts[name] = [json.loads(line)["text"] for line in content.splitlines()]
        assert len(set(texts[name])) == len(texts[name]) > 10
    corpora = tmp_path / "docs.json", tmp_path / "code.json"
    where = ("--output-dir", tmp_path)
    assert call(monkeypatch, train_tokenizer, "--input", *corpora, "--vocab-size", 600, *where) == 0
    files = str(tmp_path / "gpt2-vocab.json"), str(tmp_path / "gpt2-merges.txt")
    flags = ("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", files[0])
    assert call(
        monkeypatch, preprocess_data, "--input", corpora[0], "--output-prefix", tmp_path / "docs",
        *flags, "--merge-file", files[1], "--append-eod",
    ) == 0  # fmt: skip
    tokenizer = GPT2BPETokenizer(*files)
    ds = IndexedDataset(tmp_path / "docs_text_document")
    assert len(ds) == len(texts["docs"])
    for sequence, text in zip(ds, texts["docs"], strict=True):
        assert sequence[-1] == tokenizer.eod
        assert tokenizer.decode(sequence[:-1].tolist()) == text
