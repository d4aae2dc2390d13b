"""The files of a tokenizer, to be kept beside what was trained with it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.tokenizers.base import read_bytes
from megatron_lite.data.tokenizers.exchange import FILES
from megatron_lite.data.tokenizers.huggingface import find_tokenizer_json
from megatron_lite.data.tokenizers.sentencepiece_folder import MODEL, TYPES


class KeptFile(NamedTuple):
    """A file's name where it is kept, where it lies, and the field of DataConfig that names it."""

    name: str
    path: str | None
    setting: str | None


def _beside(main: Path, *, but: Sequence[str]) -> list[KeptFile]:
    """What else lies in a folder of Hugging Face's: it belongs to an export."""
    beside = (main.with_name(name) for name in FILES if name not in but)
    return [KeptFile(path.name, str(path), None) for path in beside if path.is_file()]


def _gpt2(data: DataConfig) -> list[KeptFile]:
    vocab, merges = Path(data.vocab_file or ""), Path(data.merge_file or "")
    names = ("vocab.json", "merges.txt")
    theirs = (vocab.name, merges.name) == names and vocab.parent == merges.parent
    return [
        KeptFile("vocab.json", data.vocab_file, "vocab_file"),
        KeptFile("merges.txt", data.merge_file, "merge_file"),
        *(_beside(vocab, but=names) if theirs else ()),
    ]


def _hugging_face(data: DataConfig) -> list[KeptFile]:
    main = find_tokenizer_json(data.tokenizer_model)
    kept = KeptFile("tokenizer.json", str(main), "tokenizer_model")
    return [kept, *_beside(main, but=["tokenizer.json"])]


def _one_model(data: DataConfig) -> list[KeptFile]:
    # under its own name, from which TikTokenizer knows its pattern
    name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(data.tokenizer_model or "").name).lstrip(".")
    return [KeptFile(name[-99:] or "model", data.tokenizer_model, "tokenizer_model")]


def _sentencepiece(data: DataConfig) -> list[KeptFile]:
    path = Path(data.tokenizer_model or "")
    others = ("tokenizer.json", "vocab.json", "merges.txt", MODEL)  # would be another tokenizer
    return [*_one_model(data), *(_beside(path, but=others) if path.name == MODEL else ())]


_FILES: dict[str, Callable[[DataConfig], list[KeptFile]]] = {
    "GPT2BPETokenizer": _gpt2,
    "HuggingFaceTokenizer": _hugging_face,
    **dict.fromkeys(TYPES, _sentencepiece),
    "TikTokenizer": _one_model,
    "NullTokenizer": lambda data: [],
}


def files_to_keep(data: DataConfig) -> dict[str, bytes]:
    """Name and content of every file the tokenizer needs; raises DataError naming flag and path."""
    return {
        kept.name: read_bytes(
            kept.path, "--" + (kept.setting or "tokenizer_model").replace("_", "-")
        )
        for kept in _FILES[data.tokenizer_type](data)
    }


def tokenizer_folder(data: DataConfig) -> Path:
    """Where a tokenizer's files lie, and those that say how a model is spoken with."""
    if data.tokenizer_type == "HuggingFaceTokenizer":
        return find_tokenizer_json(data.tokenizer_model).parent
    file = data.vocab_file if data.tokenizer_type == "GPT2BPETokenizer" else data.tokenizer_model
    return Path(file or "").parent


def from_kept(data: DataConfig, folder: Path) -> DataConfig:
    """The config with the kept files in place of the original ones, where they are all there."""
    if data.tokenizer_type == "HuggingFaceTokenizer":  # the original may be gone
        wanted = {"tokenizer_model": "tokenizer.json"}
    else:
        wanted = {
            kept.setting: kept.name for kept in _FILES[data.tokenizer_type](data) if kept.setting
        }
    if not all((folder / name).is_file() for name in wanted.values()):
        return data
    paths: dict[str, Any] = {setting: str(folder / name) for setting, name in wanted.items()}
    return dataclasses.replace(data, **paths)
