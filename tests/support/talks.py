"""Conversations of tests, a tokenizer with the tokens of all chat formats, and samples made of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.preparing.chat_encode import ChatJob
from megatron_lite.data.preparing.encode import Job
from megatron_lite.data.preparing.preprocess import preprocess
from megatron_lite.data.preparing.summary import Summary
from megatron_lite.storage.disk import Disk
from tests.support.extras import needs
from tests.support.preprocess import write_lines

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>",
           "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]  # fmt: skip


def chat_tokenizer(folder: Path) -> DataConfig:
    """A byte-level tokenizer with the special tokens of all built-in formats."""
    tokenizers = needs("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate([*alphabet, "th", "the"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("t", "h"), ("th", "e")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>",
                    "tokenizer_class": "PreTrainedTokenizerFast"})
    )  # fmt: skip
    return DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))


def talk(*said: str, system: str | None = None) -> dict[str, Any]:
    """Questions and answers in turn as a record."""
    roles = ["user", "assistant"] * len(said)
    front = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": r, "content": text} for r, text in zip(roles, said, strict=False)]
    return {"messages": [*front, *turns]}


def numbers(count: int) -> list[dict[str, Any]]:
    """So many short talks of different lengths."""
    return [talk(f"What is {n}?", f"{n}" * (n % 5 + 1), "Sure?", "Yes.") for n in range(count)]


def prepare(data: DataConfig, source: Path, prefix: Path, *, workers: int = 1, resume: bool = False,
            disk: Disk | None = None, on_bad_line: Any = "error", batch_bytes: int | None = None,
            mark_seconds: float = 15.0, **chat: Any) -> Summary:  # fmt: skip
    """Samples and mask of a file of conversations."""
    job = Job(data, chat=ChatJob(**chat), on_bad_line=on_bad_line)
    return preprocess(
        job, inputs=[str(source)], output_prefix=str(prefix), workers=workers, resume=resume,
        disk=disk or Disk(), batch_bytes=batch_bytes, mark_seconds=mark_seconds,
    )  # fmt: skip


def tuned(folder: Path, records: list[dict[str, Any]], **chat: Any) -> tuple[DataConfig, str]:
    """The tokenizer and the prefix of samples of these records, in a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    data = chat_tokenizer(folder)
    prepare(data, write_lines(folder / "talks.jsonl", *records), folder / "talks", **chat)
    return data, str(folder / "talks")
