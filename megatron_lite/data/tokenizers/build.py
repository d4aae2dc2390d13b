"""A DataConfig becomes a tokenizer, or only its vocabulary size, which is cheap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_lite.config.errors import ConfigError, MegatronLiteError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.tokenizers.base import Tokenizer, read_vocab
from megatron_lite.data.tokenizers.engines import AUTO
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2BPETokenizer
from megatron_lite.data.tokenizers.huggingface import HuggingFaceTokenizer, count_ids
from megatron_lite.data.tokenizers.null import NullTokenizer
from megatron_lite.data.tokenizers.sentencepiece import (
    GPTSentencePieceTokenizer,
    Llama2Tokenizer,
    SentencePieceTokenizer,
)
from megatron_lite.data.tokenizers.tiktoken import TikTokenizer


@dataclass(frozen=True, slots=True)
class TokenizerKind:
    """How one tokenizer is made and how its ids are counted; the integer is --vocab-size."""

    build: Callable[[DataConfig, int | None, str], Tokenizer]
    count: Callable[[DataConfig, int | None], int]


def gpt_sentencepiece(data: DataConfig, engine: str = AUTO) -> GPTSentencePieceTokenizer:
    """GPTSentencePieceTokenizer of a DataConfig."""
    return GPTSentencePieceTokenizer(
        data.tokenizer_model, chatglm_specials=data.chatglm_special_tokens, engine=engine
    )


def tiktoken(data: DataConfig, vocab_size: int | None, engine: str = AUTO) -> TikTokenizer:
    """TikTokenizer of a DataConfig."""
    return TikTokenizer(
        data.tokenizer_model,
        pattern=data.tiktoken_pattern,
        num_special_tokens=data.tiktoken_num_special_tokens,
        special_tokens=data.tiktoken_special_tokens,
        vocab_size=vocab_size,
        engine=engine,
    )


TOKENIZERS: dict[str, TokenizerKind] = {
    "GPT2BPETokenizer": TokenizerKind(
        lambda data, _, engine: GPT2BPETokenizer(data.vocab_file, data.merge_file, engine=engine),
        lambda data, _: len(read_vocab(data.vocab_file)),
    ),
    "HuggingFaceTokenizer": TokenizerKind(
        lambda data, _, engine: HuggingFaceTokenizer(data.tokenizer_model, engine=engine),
        lambda data, _: count_ids(data.tokenizer_model),
    ),
    "SentencePieceTokenizer": TokenizerKind(
        lambda data, _, engine: SentencePieceTokenizer(data.tokenizer_model, engine=engine),
        lambda data, _: SentencePieceTokenizer(data.tokenizer_model).vocab_size,
    ),
    "GPTSentencePieceTokenizer": TokenizerKind(
        lambda data, _, engine: gpt_sentencepiece(data, engine),
        lambda data, _: gpt_sentencepiece(data).vocab_size,
    ),
    "Llama2Tokenizer": TokenizerKind(
        lambda data, _, engine: Llama2Tokenizer(data.tokenizer_model, engine=engine),
        lambda data, _: Llama2Tokenizer(data.tokenizer_model).vocab_size,
    ),
    "TikTokenizer": TokenizerKind(
        lambda data, size, engine: tiktoken(data, size, engine),
        lambda data, size: tiktoken(data, size).vocab_size,
    ),
    "NullTokenizer": TokenizerKind(
        lambda _, size, engine: NullTokenizer(size, engine=engine),
        lambda _, size: NullTokenizer(size).vocab_size,
    ),
}


def kind_of(name: str) -> TokenizerKind:
    """The tokenizer of a --tokenizer-type; ConfigError lists the known ones."""
    if name not in TOKENIZERS:
        known = ", ".join(TOKENIZERS)
        raise ConfigError(f"--tokenizer-type {name} is not built in; choose from {known}")
    return TOKENIZERS[name]


def build_tokenizer(
    data: DataConfig, *, vocab_size: int | None = None, engine: str = AUTO
) -> Tokenizer:
    """The tokenizer of --tokenizer-type; vocab_size is --vocab-size, which NullTokenizer needs.

    engine: the library that carries it out, one of ENGINES; the fastest exact one by default.
    """
    return kind_of(data.tokenizer_type).build(data, vocab_size, engine)


def read_vocab_size(data: DataConfig, *, vocab_size: int | None = None) -> int:
    """Number of ids, EOD included, before padding; reads one file, needs no torch."""
    return kind_of(data.tokenizer_type).count(data, vocab_size)


def model_vocab_size(known: int, asked: int | None) -> int:
    """Ids that a model has rows for: the tokenizer's, or more where --vocab-size asks for more."""
    return max(known, asked or 0)


def asked_vocab_size(data: DataConfig, ids: int | None) -> int | None:
    """The --vocab-size behind a model of so many ids: NullTokenizer's EOD comes on top of it."""
    return ids - 1 if ids is not None and data.tokenizer_type == "NullTokenizer" else ids


def planned_vocab_size(data: DataConfig, asked: int | None) -> tuple[int | None, list[str]]:
    """The same for a run that is only planned, without its tokenizer where that cannot be read.

    Returns None where nothing is known, and a note for each thing that the run will have and the
    plan has not.
    """
    if not data.has_vocabulary:
        return asked, []
    try:
        known = read_vocab_size(data, vocab_size=asked)
    except MegatronLiteError as error:
        instead = "GPT-2's vocabulary is assumed" if asked is None else f"{asked:,} ids are planned"
        return asked, [f"the tokenizer cannot be read ({error}); {instead}"]
    notes = []
    if asked is not None and known > asked:
        notes.append(f"--vocab-size {asked}: the tokenizer has {known:,} ids, so many are planned")
    return model_vocab_size(known, asked), notes
