"""A tiny Llama with a tokenizer, trained with and without adapters, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_lite.cli import generate
from tests.support.huggingface import tool
from tests.support.tokenizers import write_gpt2
from tests.train.runs import Outcome, alone

LORA = ["--lora-rank", "4", "--lora-alpha", "16", "--lr", "0.05"]


def llama_words(folder: Path) -> list[str]:
    """Its flags; the tokenizer goes into the folder."""
    data = write_gpt2(folder, [("t", "h"), ("th", "e")])
    return [
        "--mock-data", "--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(data.vocab_file),
        "--merge-file", str(data.merge_file), "--swiglu", "--normalization", "RMSNorm",
        "--disable-bias-linear", "--position-embedding-type", "rope",
        "--untie-embeddings-and-output-weights", "--max-position-embeddings", "64",
    ]  # fmt: skip


def trained(words: Sequence[str], *more: object) -> Outcome:
    """A run that goes well."""
    done = alone(*words, *map(str, more), without=["--vocab-size"])
    assert done.rc == 0, done.err
    return done


def spoken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *asked: object
) -> list[str]:
    """What follows two prompts, the likeliest tokens."""
    said = (
        "--use-cpu", "--temperature", "0", "--jsonl", "--max-new-tokens", "12", "--dtype", "float32",
        "--prompt", "the", "a thin hat",
    )  # fmt: skip
    assert tool(generate.main, monkeypatch, *said, *asked) == 0
    return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
