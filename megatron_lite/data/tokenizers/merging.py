"""New pieces behind an old vocabulary: every old id stays, and what has no new piece is cut as before.

The old merges come first.  So a text in which no new piece can be made keeps its ids, and one in
which a piece can be made has fewer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.tokenizers.base import read_bytes, read_vocab
from megatron_lite.data.tokenizers.gpt2_bpe import byte_characters, read_merges
from megatron_lite.data.tokenizers.sentencepiece_file import NORMAL, ModelFile, ModelPiece

_MODEL = "--tokenizer-model"
EXTENDABLE = ("GPT2BPETokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")


@dataclass(frozen=True, slots=True)
class Merged:
    """The files of the new tokenizer by name, the new pieces in the order of their ids, the first of them."""

    files: dict[str, bytes]
    added: tuple[str, ...]
    first: int


def merge_vocabularies(old: DataConfig, new: DataConfig, most: int | None = None) -> Merged:
    """The tokenizer of `old` with the pieces of `new` that it lacks, at most so many, first learned first.

    Raises ConfigError for kinds that cannot be extended, DataError for files that do not fit.
    """
    if old.tokenizer_type not in EXTENDABLE or old.chatglm_special_tokens:
        what = "ChatGLM2's tokens" if old.chatglm_special_tokens else old.tokenizer_type
        raise ConfigError(
            f"{what}: new pieces would move the ids that stand behind the old ones, or the file has no "
            f"place for them - {', '.join(EXTENDABLE)} can be extended"
        )
    if (old.vocab_file is None) != (new.vocab_file is None):
        raise ConfigError(
            "a byte-level BPE takes pieces of a byte-level BPE, SentencePiece of SentencePiece: train "
            "the new one with tools/train_tokenizer.py and the --type of the old one"
        )
    make = _merge_bpe if old.vocab_file is not None else _merge_sentencepiece
    found = make(old, new, most)
    if not found.added:
        raise DataError("the old vocabulary has all pieces of the new one: there is nothing to add")
    return found


def _merge_bpe(old: DataConfig, new: DataConfig, most: int | None) -> Merged:
    vocab, merges = read_vocab(old.vocab_file), read_merges(old.merge_file)
    theirs = read_vocab(new.vocab_file)
    missing = [character for character in byte_characters() if character not in vocab]
    if missing:
        raise DataError(f"--vocab-file {old.vocab_file} lacks {len(missing)} of the 256 bytes")
    added: dict[str, int] = {}
    for a, b in read_merges(new.merge_file):
        if most is not None and len(added) == most:
            break
        known = all(part in vocab or part in added for part in (a, b))
        if a + b in theirs and a + b not in vocab and a + b not in added and known:
            merges.append((a, b))
            added[a + b] = len(vocab) + len(added)
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    files = {
        "vocab.json": json.dumps(vocab | added, ensure_ascii=False).encode(),
        "merges.txt": f"#version: 0.2\n{lines}".encode(),
    }
    return Merged(files, tuple(added), len(vocab))


def _merge_sentencepiece(old: DataConfig, new: DataConfig, most: int | None) -> Merged:
    ours, theirs = (
        ModelFile.read(read_bytes(data.tokenizer_model, _MODEL), f"{_MODEL} {data.tokenizer_model}")
        for data in (old, new)
    )
    for data, model in ((old, ours), (new, theirs)):
        if not model.is_bpe:
            raise DataError(
                f"{_MODEL} {data.tokenizer_model} is a unigram model, in which every piece competes with "
                "every other: new ones would cut old texts anew - only BPE models can be extended"
            )
    there = {piece.text for piece in ours.pieces}
    fresh = [p.text for p in theirs.pieces if p.kind == NORMAL and p.text not in there][:most]
    lowest = min((piece.score for piece in ours.pieces), default=0.0)
    added = [ModelPiece(text, lowest - 1 - place) for place, text in enumerate(fresh)]
    return Merged({"tokenizer.model": ours.with_pieces(added)}, tuple(fresh), len(ours.pieces))


def section_of(kind: str, folder: Path, names: Sequence[str]) -> DataConfig:
    """The section that names merged files where they lie."""
    if kind == "GPT2BPETokenizer":
        return DataConfig(
            vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt")
        )
    (name,) = names
    return DataConfig(tokenizer_type=kind, tokenizer_model=str(folder / name))  # type: ignore[arg-type]


def tokenizer_at(path: Path) -> DataConfig:
    """A tokenizer by its place: a SentencePiece .model, or a folder of GPT-2's two files."""
    if path.is_file():
        return DataConfig(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(path))
    for prefix in ("gpt2-", ""):
        vocab, merges = path / f"{prefix}vocab.json", path / f"{prefix}merges.txt"
        if vocab.is_file() and merges.is_file():
            return DataConfig(vocab_file=str(vocab), merge_file=str(merges))
    models = sorted(path.glob("*.model"))
    if len(models) == 1:
        return DataConfig(
            tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(models[0])
        )
    raise DataError(
        f"{path} is no tokenizer that can be extended: give a SentencePiece .model, or a folder with "
        "vocab.json and merges.txt (or gpt2-vocab.json and gpt2-merges.txt)"
    )
