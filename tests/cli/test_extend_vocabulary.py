"""New pieces behind an old vocabulary, and the rows for them: old ids, old texts and old scores stay."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from megatron_lite.cli import extend_vocabulary
from megatron_lite.config.exit import run_tool
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2BPETokenizer
from megatron_lite.data.tokenizers.merging import merge_vocabularies, tokenizer_at
from megatron_lite.data.tokenizers.sentencepiece_file import ModelFile
from megatron_lite.data.tokenizers.training import (
    SentencePieceSettings,
    train_bpe,
    train_sentencepiece,
)
from tests.support.extras import needs
from tests.support.huggingface import our_logits
from tests.train.runs import alone

needs("tokenizers")

ENGLISH = ["the weather is fine today, and the other day it was not", "other words, other days"]
CHINESE = ["今天天气很好，我们去公园散步吧！", "其他的词，其他的天气", "今天的公园"]


def bpe(folder: Path, texts: list[str], size: int) -> Path:
    folder.mkdir()
    for name, content in train_bpe(texts * 20, size, 8).items():
        (folder / name).write_bytes(content)
    return folder


def sentencepiece(
    folder: Path, texts: list[str], kind: Literal["bpe", "unigram"] = "bpe", size: int = 320
) -> Path:
    needs("sentencepiece")
    folder.mkdir()
    settings = SentencePieceSettings(kind=kind, vocab_size=size)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(texts * 20, settings))
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["extend_vocabulary.py", *map(str, words)])
    return run_tool(extend_vocabulary.main)


@pytest.mark.parametrize("kind", ["GPT-2's files", "SentencePiece"])
def test_old_texts_keep_their_ids_and_new_ones_get_shorter(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "SentencePiece":
        old, new = sentencepiece(tmp_path / "a", ENGLISH), sentencepiece(tmp_path / "b", CHINESE)
    else:
        old, new = bpe(tmp_path / "a", ENGLISH, 300), bpe(tmp_path / "b", CHINESE, 300)
    assert call(monkeypatch, old, new, tmp_path / "both") == 0
    said = capsys.readouterr().out
    before, after = (build_tokenizer(tokenizer_at(path)) for path in (old, tmp_path / "both"))
    assert f"{before.vocab_size} old ids" in said and f"{after.vocab_size} in all" in said
    assert before.vocab_size < after.vocab_size and before.eod == after.eod
    ids = range(before.vocab_size)
    assert [before.decode([n]) for n in ids] == [after.decode([n]) for n in ids]
    for text in ENGLISH:
        assert after.encode(text) == before.encode(text)
    for text in CHINESE:
        shorter = after.encode(text)
        assert len(shorter) < len(before.encode(text)) / 1.5
        assert max(shorter) >= before.vocab_size and after.decode(shorter) == text


def test_merged_files_are_the_same_to_every_engine(tmp_path: Path) -> None:
    old, new = bpe(tmp_path / "a", ENGLISH, 300), bpe(tmp_path / "b", CHINESE, 300)
    merged = merge_vocabularies(tokenizer_at(old), tokenizer_at(new))
    for name, content in merged.files.items():
        (tmp_path / name).write_bytes(content)
    files = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    for text in (*ENGLISH, *CHINESE, "today今天"):
        ids = {engine: GPT2BPETokenizer(*files, engine=engine).encode_batch([text]).ids.tolist()
               for engine in ("auto", "tokenizers", "plain")}  # fmt: skip
        assert ids["auto"] == ids["tokenizers"] == ids["plain"]


def test_at_most_so_many_are_added_first_learned_first(tmp_path: Path) -> None:
    old, new = bpe(tmp_path / "a", ENGLISH, 300), bpe(tmp_path / "b", CHINESE, 300)
    all_of_them = merge_vocabularies(tokenizer_at(old), tokenizer_at(new)).added
    assert merge_vocabularies(tokenizer_at(old), tokenizer_at(new), 7).added == all_of_them[:7]


def test_a_model_file_that_is_read_and_written_is_the_same(tmp_path: Path) -> None:
    library = needs("sentencepiece")
    path = sentencepiece(tmp_path / "a", CHINESE) / "tokenizer.model"
    content = path.read_bytes()
    found = ModelFile.read(content, "a.model")
    assert found.with_pieces([]) == content and found.is_bpe
    processor = library.SentencePieceProcessor(model_proto=content)
    assert [piece.text for piece in found.pieces] == [
        processor.id_to_piece(n) for n in range(processor.vocab_size())
    ]
    assert [piece.score for piece in found.pieces] == [
        processor.get_score(n) for n in range(processor.vocab_size())
    ]


def test_what_cannot_be_extended_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = bpe(tmp_path / "a", ENGLISH, 290)
    model = sentencepiece(tmp_path / "b", CHINESE)
    unigram = sentencepiece(tmp_path / "c", CHINESE, "unigram", 300)
    (tmp_path / "cut.model").write_bytes((model / "tokenizer.model").read_bytes()[:777])
    (tmp_path / "empty").mkdir()
    for words, code, said in (
        ((old, model), 2, "a byte-level BPE takes pieces of a byte-level BPE"),
        ((unigram, model), 3, "only BPE models can be extended"),
        ((old, old), 3, "there is nothing to add"),
        ((tmp_path / "cut.model", model), 3, "cut.model is no SentencePiece model: it is cut off"),
        ((old, tmp_path / "empty"), 3, "is no tokenizer that can be extended"),
        ((old, model, "--ckpt-step", 3), 2, "--ckpt-step 3 is for run folders"),
        ((old, model, "--most", 0), 2, "--most 0"),
    ):
        assert call(monkeypatch, *words[:2], tmp_path / "to", *words[2:]) == code
        assert said in capsys.readouterr().err
        assert not (tmp_path / "to").exists()
    assert call(monkeypatch, old, old, old) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    chatglm = DataConfig(tokenizer_type="GPTSentencePieceTokenizer", chatglm_special_tokens=True)
    with pytest.raises(extend_vocabulary.ConfigError, match="ChatGLM2's tokens"):
        merge_vocabularies(chatglm, chatglm)


def mean_loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    return float(
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_keeps_its_scores_and_trains_on(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = bpe(tmp_path / "a", ENGLISH, 280), bpe(tmp_path / "b", CHINESE, 300)
    files = tokenizer_at(old)
    words = ["--mock-data", "--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(files.vocab_file),
             "--merge-file", str(files.merge_file)]  # fmt: skip
    words += [] if tied else ["--untie-embeddings-and-output-weights"]
    run, to = tmp_path / "run", tmp_path / "to"
    done = alone(*words, "--save", str(run), "--train-iters", "4", without=["--vocab-size"])
    assert done.rc == 0, done.err
    assert call(monkeypatch, run, new, to) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    tokenizer: Tokenizer = build_tokenizer(tokenizer_at(to / "tokenizer"))
    added = tokenizer.vocab_size - 280
    assert f"280 rows of the vocabulary -> {280 + added}" in said
    assert f"a loss on old text rises by at most {math.log1p(added / 280):.4f}" in said

    tokens = torch.randint(0, 280, (3, 16), generator=torch.Generator().manual_seed(1))
    before, after = our_logits(run, tokens), our_logits(to, tokens)
    torch.testing.assert_close(after[..., :280], before, rtol=1e-6, atol=1e-6)
    mean = before.mean(dim=-1, keepdim=True).expand(-1, -1, added)
    torch.testing.assert_close(after[..., 280:], mean, rtol=1e-4, atol=1e-5)
    ours, theirs = mean_loss(before, tokens), mean_loss(after, tokens)
    assert mean_loss(after[..., :280], tokens) == pytest.approx(ours, abs=1e-6)
    assert ours < theirs <= ours + math.log1p(added / 280) + 1e-6

    again = alone(
        "--config", str(to / "config.yaml"), "--mock-data", "--load", str(to), "--finetune",
        "--train-iters", "2", without=["--vocab-size", "--tokenizer-type"],
    )  # fmt: skip
    assert again.rc == 0, again.err
