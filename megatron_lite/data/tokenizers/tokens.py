"""A tokenizer's tokens as GGUF keeps them: byte-level BPE with its merges, or pieces of SentencePiece."""

from __future__ import annotations

import dataclasses
import importlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lite.config.errors import CheckpointError, ConfigError
from megatron_lite.config.extras import how_to_install
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.tokenizers.base import read_bytes
from megatron_lite.data.tokenizers.exchange import files_for_huggingface
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2_EOD
from megatron_lite.data.tokenizers.sentencepiece_folder import TYPES

_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6
"""Types of a token; no text becomes a control token, an unused one is a row without any."""

TOKENIZER_BIN = "tokenizer.bin"


@dataclass(frozen=True, slots=True)
class GGUFVocabulary:
    """model: "gpt2" or "llama", the two ways llama.cpp cuts a text; pre: how it is cut before BPE.

    begin: the id that it puts before every text, if any.
    """

    model: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    pre: str | None = None
    begin: int | None = None

    def describe(self, writer: Any, gguf: Any, *, rows: int) -> None:
        """Into a GGUFWriter; every row of the token table gets a name."""
        if len(self.tokens) > rows:
            raise CheckpointError(
                f"the tokenizer has {len(self.tokens)} tokens, the model {rows} rows: it is another's; "
                "add --no-tokenizer"
            )
        spare = range(len(self.tokens), rows)
        writer.add_tokenizer_model(self.model)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list([*self.tokens, *(f"[PAD{n}]" for n in spare)])
        writer.add_token_types([*self.types, *(_UNUSED for _ in spare)])
        writer.add_add_bos_token(
            self.begin is not None
        )  # llama.cpp's own default is another for each
        if self.begin is not None:
            writer.add_bos_token_id(self.begin)
        if self.merges:
            writer.add_token_merges(list(self.merges))
        if self.scores:
            writer.add_token_scores([*self.scores, *(-1000.0 for _ in spare)])


def byte_level(files: Mapping[str, bytes]) -> GGUFVocabulary | None:
    """GPT-2's vocab.json and merges.txt; None where these files are another tokenizer's.

    A tokenizer.json beside them that cuts otherwise than GPT-2 has no name in GGUF that we know of.
    """
    if not {"vocab.json", "merges.txt"} <= files.keys():
        return None
    if not _cuts_like_gpt2(files.get("tokenizer.json")):
        return None
    ids = json.loads(files["vocab.json"])
    if sorted(ids.values()) != list(range(len(ids))):
        return None
    tokens = sorted(ids, key=ids.__getitem__)
    lines = files["merges.txt"].decode().splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    types = [_CONTROL if token == GPT2_EOD else _NORMAL for token in tokens]
    return GGUFVocabulary("gpt2", tokens, types, merges, pre="gpt-2")


def _cuts_like_gpt2(content: bytes | None) -> bool:
    if content is None:
        return True
    whole = json.loads(content)
    cut = whole.get("pre_tokenizer") or {}
    plain = cut.get("type") == "ByteLevel" and cut.get("use_regex", True)
    return (
        bool(plain) and whole.get("normalizer") is None and not cut.get("add_prefix_space", False)
    )


# -- SentencePiece ------------------------------------------------------------------------------


def vocabulary_of(
    data: DataConfig, *, positions: int, begins: Sequence[int] = ()
) -> GGUFVocabulary | None:
    """The tokens of a run's tokenizer; None where GGUF has no form for it that we know of.

    begins: what stands before every text for the model, beside what the tokenizer itself gives.
    """
    if data.tokenizer_type in TYPES:
        return sentencepiece_vocabulary(data)
    own = data.tokenizer_type == "GPT2BPETokenizer" and data.vocab_file and data.merge_file
    if own or data.tokenizer_type == "HuggingFaceTokenizer":
        found = byte_level(files_for_huggingface(data, positions=positions))
        begin = begins[-1] if begins else None
        return None if found is None else dataclasses.replace(found, begin=begin)
    return None


def sentencepiece_vocabulary(data: DataConfig) -> GGUFVocabulary:
    """The pieces of a SentencePiece file with their scores; ConfigError where the library is absent."""
    try:
        library: Any = importlib.import_module("sentencepiece")
    except ImportError:
        raise ConfigError(
            f"the tokenizer's file needs sentencepiece: {how_to_install('sentencepiece')}; or add "
            "--no-tokenizer"
        ) from None
    model = library.SentencePieceProcessor()
    model.LoadFromSerializedProto(read_bytes(data.tokenizer_model, "--tokenizer-model"))
    ids = range(model.GetPieceSize())
    return GGUFVocabulary(
        "llama",
        [model.IdToPiece(n) for n in ids],
        [_piece_type(model, n) for n in ids],
        scores=[model.GetScore(n) for n in ids],
        begin=model.bos_id() if data.tokenizer_type == "Llama2Tokenizer" else None,
    )


def _piece_type(model: Any, number: int) -> int:
    for asked, kind in ((model.IsUnknown, _UNKNOWN), (model.IsControl, _CONTROL),
                        (model.IsByte, _BYTE), (model.IsUnused, _UNUSED)):  # fmt: skip
        if asked(number):
            return kind
    return _NORMAL


def tokenizer_bin(vocabulary: GGUFVocabulary, *, rows: int) -> bytes:
    """llama2.c's tokenizer.bin: the longest token, then of each its score, its length and its bytes.

    A space is a space here, the two tokens that begin and end a text have lines of their own.
    """
    found = []
    for number, token in enumerate(vocabulary.tokens):
        text = f"\n{token}\n" if token in ("<s>", "</s>") else token.replace("\u2581", " ")
        found.append((vocabulary.scores[number], text.encode()))
    found += [(-1e9, f"<unused {n}>".encode()) for n in range(len(found), rows)]
    head = struct.pack("<i", max(len(text) for _, text in found))
    return head + b"".join(struct.pack("<fi", score, len(text)) + text for score, text in found)
