"""Small tokenizers of every kind, in files of their own, and the config that names them."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path

from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2_EOD, byte_characters
from tests.support.extras import needs


def write_gpt2(folder: Path, merges: list[tuple[str, str]]) -> DataConfig:
    """A vocabulary of all bytes, the merges and EOD."""
    tokens = [*byte_characters(), *sorted(a + b for a, b in merges), GPT2_EOD]
    vocab = {token: number for number, token in enumerate(tokens)}
    (folder / "my vocab").write_text(json.dumps(vocab), encoding="utf-8")
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "my merges").write_text(lines, encoding="utf-8")
    return DataConfig(
        vocab_file=str(folder / "my vocab"), merge_file=str(folder / "my merges"), mock_data=True
    )


def gpt2(folder: Path) -> DataConfig:
    return write_gpt2(folder, [("t", "h"), ("th", "e")])


def hugging_face(folder: Path) -> DataConfig:
    tokenizers = needs("tokenizers")
    vocab = {"t": 0, "h": 1, "e": 2, "th": 3, "<end>": 4}
    model = tokenizers.models.BPE(vocab=vocab, merges=[("t", "h")])
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))


def tiktoken(folder: Path) -> DataConfig:
    ranks = [bytes([n]) for n in range(256)] + [b"th", b"the"]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (folder / "p50k_base.tiktoken").write_text("".join(lines))  # the name says which pattern
    path = str(folder / "p50k_base.tiktoken")
    return DataConfig(tokenizer_type="TikTokenizer", tokenizer_model=path)


def sentencepiece(folder: Path) -> DataConfig:
    library = needs("sentencepiece")
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(["the other thing they think"] * 20),
        model_prefix=str(folder / "a model"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return DataConfig(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(folder / "a model.model")
    )


def sentencepiece_as_gpt(folder: Path) -> DataConfig:
    path = sentencepiece(folder).tokenizer_model
    return DataConfig(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=path)


def llama_2(folder: Path) -> DataConfig:
    return dataclasses.replace(sentencepiece_as_gpt(folder), tokenizer_type="Llama2Tokenizer")


def null(folder: Path) -> DataConfig:
    return DataConfig(tokenizer_type="NullTokenizer")


KINDS = {
    "GPT2BPETokenizer": gpt2,
    "HuggingFaceTokenizer": hugging_face,
    "TikTokenizer": tiktoken,
    "SentencePieceTokenizer": sentencepiece,
    "GPTSentencePieceTokenizer": sentencepiece_as_gpt,
    "Llama2Tokenizer": llama_2,
    "NullTokenizer": null,
}
