"""The flags that name a tokenizer, and the data section that they say."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.tokenizers.build import TOKENIZERS

_FIELDS = (
    "tokenizer_type", "vocab_file", "merge_file", "tokenizer_model", "chatglm_special_tokens",
    "tiktoken_pattern", "tiktoken_num_special_tokens", "tiktoken_special_tokens",
)  # fmt: skip


def add_tokenizer_flags(add: Callable[..., Any]) -> None:
    """Megatron's, through add_argument of a parser or a group."""
    add("--tokenizer-type", default="GPT2BPETokenizer", help=", ".join(TOKENIZERS))
    add("--vocab-file", help="gpt2-vocab.json")
    add("--merge-file", help="gpt2-merges.txt")
    add("--tokenizer-model", help="folder or file of the other tokenizers")
    add("--vocab-size", type=int, help="for NullTokenizer; cuts TikTokenizer's .json")
    add("--tiktoken-pattern", help="v1, v2, gpt2, cl100k or o200k; by the file's name")
    add("--tiktoken-num-special-tokens", type=int, default=1000, help="before the ranks of a .json")
    add("--tiktoken-special-tokens", nargs="+", default=[], help="names of the first of them")
    add("--chatglm-special-tokens", action="store_true", help="ChatGLM2's five, appended")


def tokenizer_section(asked: argparse.Namespace) -> DataConfig:
    """The section by which a tokenizer is built; --vocab-size goes beside it."""
    return DataConfig(**{name: getattr(asked, name) for name in _FIELDS})
