"""The demo's way: corpus, vocabulary, token files; the vocabulary is GPT-2's format."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.cli import demo_corpus, preprocess_data, train_tokenizer
from megatron_lite.config.exit import run_tool
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2BPETokenizer
from megatron_lite.data.tokenizers.sentencepiece import GPTSentencePieceTokenizer
from megatron_lite.data.tokenizers.training import TextSample, token_names
from tests.support.extras import needs

needs("tokenizers")


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


@pytest.mark.ci
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


CHINESE = [
    "今天天气很好，我们去公园散步吧！你觉得怎么样？",
    "“中华人民共和国”成立于１９４９年；北京是首都（人口两千万）。",
    "今天天气很好，今天天气很好，今天天气很好……",
    "The weather is fine today, isn't it?  Let's go to the park.",
]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece-bpe", "sentencepiece-unigram"])
def test_training_does_not_see_how_the_input_is_cut_and_chinese_survives(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    if kind != "bpe":
        needs("sentencepiece")
    records = [{"text": f"{CHINESE[n % 4]}\n{n % 5}"} for n in range(400)]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    whole = tmp_path / "whole.jsonl"
    whole.write_text("".join(lines), encoding="utf-8")
    (tmp_path / "cut").mkdir()
    for n in range(0, 400, 70):
        part = "".join(lines[n : n + 70])
        (tmp_path / "cut" / f"{n:03}.jsonl").write_text(part, encoding="utf-8")
    (tmp_path / "array.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    files = []
    for name, source in (("a", whole), ("b", tmp_path / "cut"), ("c", tmp_path / "array.json")):
        flags = ("--type", kind, "--vocab-size", 400, "--max-token-chars", 3)
        folder = tmp_path / name
        assert call(
            monkeypatch, train_tokenizer, "--input", source, *flags, "--output-dir", folder
        ) == 0  # fmt: skip
        files.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert files[0] == files[1] == files[2]
    tokenizer: Any
    if kind == "bpe":
        tokenizer = GPT2BPETokenizer(
            str(tmp_path / "a/gpt2-vocab.json"), str(tmp_path / "a/gpt2-merges.txt")
        )
    else:
        tokenizer = GPTSentencePieceTokenizer(str(tmp_path / "a/tokenizer.model"))
    for text in CHINESE:  # full-width punctuation and digits are not normalised away
        assert tokenizer.decode(tokenizer.encode(text)) == text
    names = token_names(tokenizer)
    assert max(len(name) for name in names) == 3
    assert any(len(name.encode()) == 9 for name in names)  # three characters, not three bytes
    out = capsys.readouterr().out
    assert "characters per token: " in out and "longest tokens: " in out
    assert "unknown tokens: 0 of " in out


def test_runs_of_han_are_words_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's pattern takes letters of all scripts that touch for one word, and learns them together."""
    (tmp_path / "a.json").write_text(json.dumps({"text": "我们使用Python语言 " * 60}))
    mixed = {}
    for name, flags in (("plain", ()), ("runs", ("--han-runs",))):
        words = (
            "--input",
            tmp_path / "a.json",
            "--vocab-size",
            300,
            "--output-dir",
            tmp_path / name,
        )
        assert call(monkeypatch, train_tokenizer, *words, *flags) == 0
        files = [str(tmp_path / name / file) for file in train_tokenizer.BPE]
        tokenizer = GPT2BPETokenizer(*files)
        assert tokenizer.decode(tokenizer.encode("使用Python，我")) == "使用Python，我"
        names = [n for n in token_names(tokenizer) if re.search("[\u4e00-\u9fff]", n)]
        mixed[name] = [n for n in names if re.search("[A-Za-z ]", n)]
        assert any(len(n) > 1 for n in names)
    assert mixed["plain"] and not mixed["runs"]


def test_unknown_characters_are_counted_without_byte_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("sentencepiece")
    texts = ["common words are common, and words are words " * 5] * 99 + ["䶮"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    arguments = ("--input", tmp_path / "a.jsonl", "--vocab-size", 300, "--output-dir", tmp_path)
    flags = ("--type", "sentencepiece-bpe", "--no-byte-fallback", "--character-coverage", 0.999)
    assert call(monkeypatch, train_tokenizer, *arguments, *flags) == 0
    assert "unknown tokens: 1 of " in capsys.readouterr().out


def test_a_sample_is_spread_over_the_stream_and_bounded() -> None:
    sample = TextSample(limit=100)
    assert len(list(sample.watch(f"{n:010}" for n in range(1000)))) == 1000
    numbers = [int(text) for text in sample.texts]
    steps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    assert len(steps) == 1 and 5 <= len(numbers) <= 10 and numbers[-1] > 800


@pytest.mark.parametrize(
    "kind, name", [("bpe", "gpt2-merges.txt"), ("sentencepiece-bpe", "tokenizer.model")]
)
def test_a_vocabulary_that_is_there_is_not_replaced_unasked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    name: str,
) -> None:
    """Said before the corpus is looked at, which is not even there."""
    (tmp_path / name).write_text("of a model that was trained for weeks")
    words = ("--input", tmp_path / "a", "--type", kind, "--vocab-size", 300, "--output-dir")
    assert call(monkeypatch, train_tokenizer, *words, tmp_path) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / name} exists; give --overwrite or another --output-dir" in said
    assert call(monkeypatch, train_tokenizer, *words, tmp_path, "--overwrite") == 3
    assert f"{tmp_path / 'a'}" in capsys.readouterr().err
    if kind == "bpe":
        (tmp_path / "a").write_text(json.dumps({"text": "ab ab " * 50}) + "\n")
        assert call(monkeypatch, train_tokenizer, *words, tmp_path, "--overwrite") == 0
        assert (tmp_path / name).read_text(encoding="utf-8").startswith("#version")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--type", "sentencepiece-bpe", "--vocab-size", 259), "at least 260"),
        (("--vocab-size", 300, "--max-token-chars", 0), "--max-token-chars 0"),
        (("--vocab-size", 300, "--character-coverage", 0.5), "--character-coverage 0.5"),
        (("--vocab-size", 300, "--type", "sentencepiece-bpe", "--han-runs"), "--han-runs is for"),
    ],
)
def test_wrong_sizes_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[object, ...],
    message: str,
) -> None:
    common = ("--input", tmp_path / "a", "--output-dir", tmp_path)
    assert call(monkeypatch, train_tokenizer, *common, *flags) == 2
    assert message in capsys.readouterr().err
