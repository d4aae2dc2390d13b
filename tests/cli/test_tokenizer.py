"""What tools/tokenizer.py says of a text: every piece, what is lost, and the numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_lite.cli import tokenizer as tool
from megatron_lite.config.exit import run_tool
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.data.tokenizers.examining import changed_from, measure, pieces_of
from megatron_lite.data.tokenizers.training import SentencePieceSettings, train_sentencepiece
from tests.support.extras import needs
from tests.support.tokenizers import KINDS, gpt2


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", *map(str, arguments)])
    return run_tool(tool.main)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"NullTokenizer"}))
def test_the_pieces_of_a_text_are_its_ids_and_join_to_what_comes_back(
    kind: str, tmp_path: Path
) -> None:
    if "SentencePiece" in kind or kind == "Llama2Tokenizer":
        needs("sentencepiece")
    tokenizer = build_tokenizer(KINDS[kind](tmp_path))
    ids = tokenizer.encode("the hethe")
    found = pieces_of(tokenizer, ids)
    assert [piece.id for piece in found] == ids
    assert "".join(piece.text or "" for piece in found) == tokenizer.decode(ids)


def test_bytes_of_a_character_are_parts_of_it(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(gpt2(tmp_path))
    found = pieces_of(tokenizer, tokenizer.encode("the 中h"))
    texts = [piece.text for piece in found]
    assert texts == ["the", " ", None, None, "中", "h"]


def test_each_text_is_shown_with_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = gpt2(tmp_path)
    files = ("--vocab-file", data.vocab_file, "--merge-file", data.merge_file)
    assert call(monkeypatch, *files, "--text", "the 中", "thethe", "--most-pieces", 5) == 0
    said = capsys.readouterr().out
    assert said.startswith("GPT2BPETokenizer: 259 ids\n'the 中':\n")
    assert "  257  'the'\n" in said and said.count("a part of the next character") == 2
    assert "characters per token: 1.000 (5 characters of 1 texts, 1.400 bytes per token)" in said
    assert "characters per token: 3.000 (6 characters" in said
    assert "unknown tokens: 0 of 5 (0.0000%)" in said and "comes back" not in said
    assert call(monkeypatch, *files, "--text", "a b c d", "--most-pieces", 5) == 0
    assert "and 2 more (--most-pieces)" in capsys.readouterr().out


def test_what_a_normaliser_changes_is_said_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """System 002's vocabulary: with NFKC a model can never write a full-width comma."""
    needs("sentencepiece")
    settings = SentencePieceSettings(
        kind="bpe", vocab_size=300, normalizer="nfkc", byte_fallback=False
    )
    path = tmp_path / "a.model"
    path.write_bytes(train_sentencepiece(["你好，世界。 hello, world"] * 30, settings))
    (tmp_path / "a.jsonl").write_text(
        '{"问": "你好，"}\n{"问": "你好"}\n{"问": "龘"}\n', encoding="utf-8"
    )
    words = ("--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", path)
    assert call(monkeypatch, *words, "--text", "你好，世界龘") == 0
    said = capsys.readouterr().out
    assert "another text from character 2 on" in said and "(unknown)" in said
    assert call(monkeypatch, *words, "--input", tmp_path / "a.jsonl", "--json-keys", "问") == 0
    said = capsys.readouterr().out
    assert "a sample of 3 of 3 texts:" in said and "longest tokens: " in said
    assert "texts that do not come back as they were: 2 of 3" in said
    assert "unknown tokens: 1 of " in said


def test_nothing_to_look_at_and_files_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch) == 2
    assert "nothing to look at" in capsys.readouterr().err
    assert call(monkeypatch, "--text", "a", "--most-pieces", 0) == 2
    assert call(monkeypatch, "--text", "a", "--vocab-file", "/no", "--merge-file", "/no") == 3
    assert "--vocab-file /no cannot be read" in capsys.readouterr().err


def test_texts_differ_where_one_ends() -> None:
    assert changed_from("abc", "abc") is None
    assert (changed_from("abc", "ab"), changed_from("abc", "axc")) == (2, 1)


def test_a_measure_is_the_sums_over_its_texts(tmp_path: Path) -> None:
    found = measure(build_tokenizer(gpt2(tmp_path)), ["the", "", "中"])
    assert (found.texts, found.characters, found.bytes, found.tokens) == (3, 4, 6, 4)
    assert json.dumps(found.lines).count("%") == 1
