"""Vocabularies learned from a stream of texts; how the stream was cut into batches is not seen.

Byte-level BPE (Sennrich et al. 2016 over GPT-2's bytes) by the `tokenizers` library, SentencePiece
BPE and unigram (arXiv:1808.06226, arXiv:1804.10959) by `sentencepiece`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.extras import how_to_install
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.examining import measure
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2_EOD, WORDS
from megatron_lite.data.tokenizers.sentencepiece import CHATGLM_SPECIALS

SAMPLE_CHARACTERS = 1 << 20
_LONGEST = 10
LINE_BYTES = 16384  # SentencePiece leaves out longer lines; ours are cut before
REPLACEMENT = "\ufffd"
HAN = r"\p{Han}+"


@dataclass(slots=True)
class TextSample:
    """Some texts of a stream, evenly spread: every k-th, k doubling as the stream gets longer."""

    texts: list[str] = field(default_factory=list)
    limit: int = SAMPLE_CHARACTERS
    _every: int = 1
    _size: int = 0

    def watch(self, stream: Iterable[str]) -> Iterator[str]:
        """The same stream, remembered in part."""
        for number, text in enumerate(stream):
            if number % self._every == 0:
                self.texts.append(text)
                self._size += len(text)
                while self._size > self.limit and len(self.texts) > 1:
                    self.texts = self.texts[::2]
                    self._every *= 2
                    self._size = sum(map(len, self.texts))
            yield text


def train_bpe(
    texts: Iterable[str], vocab_size: int, max_token_chars: int, *, han_runs: bool = False
) -> dict[str, bytes]:
    """gpt2-vocab.json and gpt2-merges.txt of vocab_size - 1 tokens and <|endoftext|>, the last id.

    Words longer than max_token_chars are learned in pieces of that many characters, so that no
    token is longer.  han_runs: Han characters that follow one another are a word by themselves, so
    that no token joins them with the Latin letters beside them, which GPT-2's pattern calls one word.
    """
    try:
        import tokenizers  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise ConfigError(
            f"training a BPE needs the package `tokenizers`: {how_to_install('tokenizers')}"
        ) from error
    words = tokenizers.pre_tokenizers
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = words.Sequence(
        [
            words.Split(tokenizers.Regex(WORDS), "isolated"),
            *([words.Split(tokenizers.Regex(HAN), "isolated")] if han_runs else []),
            words.Split(tokenizers.Regex(rf"[\s\S]{{1,{max_token_chars}}}"), "isolated"),
            words.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=words.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    if GPT2_EOD in vocab:
        raise DataError(f"the text made {GPT2_EOD} a word of its own; remove it from the input")
    vocab[GPT2_EOD] = len(vocab)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    return {
        "gpt2-merges.txt": f"#version: 0.2\n{lines}".encode(),
        "gpt2-vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceSettings:
    """What SentencePiece is asked for; sizes in pieces and characters."""

    kind: Literal["bpe", "unigram"]
    vocab_size: int
    max_token_chars: int = 16
    character_coverage: float = 0.9995
    normalizer: str = "identity"
    byte_fallback: bool = True
    sample: int = 0


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of at most LINE_BYTES bytes, which is what SentencePiece learns from."""
    for text in texts:
        for line in text.split("\n"):
            longest = LINE_BYTES // 4
            for begin in range(0, len(line), longest):
                piece = line[begin : begin + longest].replace("\0", " ")
                if piece.strip():
                    yield piece


def train_sentencepiece(texts: Iterable[str], settings: SentencePieceSettings) -> bytes:
    """A .model: unknown 0, begin 1, end 2, padding 3, then bytes and pieces."""
    try:
        import sentencepiece  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise ConfigError(
            "training SentencePiece needs the package `sentencepiece`: "
            f"{how_to_install('sentencepiece')}"
        ) from error
    model = io.BytesIO()
    options: dict[str, Any] = {
        "model_type": settings.kind,
        "vocab_size": settings.vocab_size,
        "hard_vocab_limit": False,
        "max_sentencepiece_length": settings.max_token_chars,
        "character_coverage": settings.character_coverage,
        "normalization_rule_name": settings.normalizer,
        "byte_fallback": settings.byte_fallback,
        "split_digits": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "max_sentence_length": LINE_BYTES,
        "pad_id": 3,
        "num_threads": 1,  # the same pieces on every machine
        "minloglevel": 2,
    }
    if settings.sample:
        options |= {"input_sentence_size": settings.sample, "shuffle_input_sentence": True}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(texts), model_writer=model, **options
        )
    except RuntimeError as error:
        raise DataError(
            f"SentencePiece cannot learn {settings.vocab_size} pieces from this text: {error} - "
            "choose another --vocab-size or a smaller --character-coverage"
        ) from error
    return model.getvalue()


def token_names(tokenizer: Tokenizer) -> list[str]:
    """The text of every id that is whole characters."""
    specials = {f"<0x{byte:02X}>" for byte in range(256)} | set(CHATGLM_SPECIALS)
    out = (tokenizer.eod, tokenizer.unknown)
    ids = (number for number in range(tokenizer.vocab_size) if number not in out)
    names = [tokenizer.decode([number]) for number in ids]
    return [name for name in names if REPLACEMENT not in name and name not in specials]


def longest_line_of(tokenizer: Tokenizer) -> str:
    """The longest tokens, in a line."""
    longest = sorted(token_names(tokenizer), key=lambda name: (-len(name), name))[:_LONGEST]
    return "longest tokens: " + ", ".join(repr(name) for name in longest)


def report_lines(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Characters per token, share of unknown tokens, and the longest tokens, on a sample."""
    return [*measure(tokenizer, texts).lines, longest_line_of(tokenizer)]
