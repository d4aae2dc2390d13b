"""A tokenizer's files as Hugging Face lays them out beside a model, in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lite.config.errors import DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.tokenizers.base import LARGEST_FILE, read_bytes, read_vocab
from megatron_lite.data.tokenizers.beginning import put_before
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2_EOD, gpt2_tokenizer_json, read_merges
from megatron_lite.data.tokenizers.huggingface import ALONG
from megatron_lite.data.tokenizers.sentencepiece_folder import (
    ADDED,
    MODEL,
    TYPES,
    model_files,
    model_section,
)
from megatron_lite.storage.reading import read_plain

FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", ADDED, MODEL, *ALONG,
)  # fmt: skip
"""What Hugging Face may keep beside a model."""


def files_beside_model(folder: Path) -> dict[str, bytes]:
    """Those of FILES that the folder has."""
    found = {}
    for name in FILES:
        try:
            found[name] = read_plain(folder / name, LARGEST_FILE)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{folder / name} cannot be read: {error.strerror}") from error
    return found


def section_for(
    files: Mapping[str, bytes], folder: Path, *, eos: str | None = None, rows: int | None = None
) -> dict[str, Any]:
    """Fields of the data section for a folder with these files; nothing where they are no tokenizer.

    eos: the token that the files say ends a document; GPT2BPETokenizer knows only its own.
    rows: of the model, where there is one.
    """
    names = set(files)
    if {"vocab.json", "merges.txt"} <= names and eos in (None, GPT2_EOD) and _cuts_as_gpt2(files):
        return {
            "tokenizer_type": "GPT2BPETokenizer",
            "vocab_file": str(folder / "vocab.json"),
            "merge_file": str(folder / "merges.txt"),
        }
    if "tokenizer.json" in names:
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder)}
    if {"vocab.json", "merges.txt"} <= names:
        why = f"the files name the eos_token {eos!r}, GPT2BPETokenizer ends documents with {GPT2_EOD!r}"
        if eos in (None, GPT2_EOD):
            why = f"{folder}: tokenizer_config.json names another class than GPT-2's, which cuts otherwise"
        raise DataError(
            f"{why}, and there is no tokenizer.json: let transformers write one (save_pretrained), "
            "or add --no-tokenizer"
        )
    if MODEL in names:
        return model_section(files, folder, eos=eos, rows=rows)
    return {}


def _cuts_as_gpt2(files: Mapping[str, bytes]) -> bool:
    """Whether vocab.json and merges.txt are all of a tokenizer that cuts a text as GPT-2's does.

    Qwen2's lie in files of the same names, and its tokenizer.json says how it cuts.
    """
    try:
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        whole = json.loads(files.get("tokenizer.json", b"{}"))
    except ValueError:  # what is no JSON is said by who reads it
        return True
    if not isinstance(config, dict) or not isinstance(whole, dict):
        return True
    kind = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    cut = whole.get("pre_tokenizer") or {"type": "ByteLevel"}
    plain = isinstance(cut, dict) and cut.get("type") == "ByteLevel" and cut.get("use_regex", True)
    if whole:  # it counts more than the name of a class
        return (
            bool(plain)
            and whole.get("normalizer") is None
            and not put_before(files["tokenizer.json"])
        )
    return kind == "GPT2Tokenizer"


def files_for_huggingface(data: DataConfig, *, positions: int) -> dict[str, bytes]:
    """The files for a folder of Hugging Face; positions: the longest text, in tokens.

    A folder that came from there is copied as it is; GPT-2's two files get the three that today's
    transformers wants besides, a SentencePiece file its tokenizer_config.json.  Raises DataError for
    tokenizers of another kind.
    """
    if data.tokenizer_type == "HuggingFaceTokenizer" and data.tokenizer_model is not None:
        given = Path(data.tokenizer_model)
        return files_beside_model(given if given.is_dir() else given.parent)
    if data.tokenizer_type in TYPES:
        beside = files_beside_model(Path(data.tokenizer_model or "").parent)
        return model_files(data, beside, positions=positions)
    if data.tokenizer_type != "GPT2BPETokenizer":
        raise DataError(
            f"--tokenizer-type {data.tokenizer_type} has no form in a folder of Hugging Face's: "
            "add --no-tokenizer to write the model alone"
        )
    vocab_bytes = read_bytes(data.vocab_file, "--vocab-file")
    merge_bytes = read_bytes(data.merge_file, "--merge-file")
    theirs = Path(data.vocab_file or "").name == "vocab.json"
    beside = files_beside_model(Path(data.vocab_file or "").parent) if theirs else {}
    if "tokenizer.json" in beside:
        return beside
    vocab = read_vocab(data.vocab_file)
    special = {"content": GPT2_EOD, "lstrip": False, "normalized": True, "rstrip": False,
               "single_word": False}  # fmt: skip
    whole = json.loads(gpt2_tokenizer_json(vocab, read_merges(data.merge_file)))
    bytes_back = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                  "use_regex": True}  # fmt: skip
    if GPT2_EOD in vocab:
        whole["added_tokens"] = [{"id": vocab[GPT2_EOD], **special, "special": True}]
    whole["decoder"] = bytes_back
    whole["post_processor"] = bytes_back | {"trim_offsets": False}
    names = (
        {f"{kind}_token": GPT2_EOD for kind in ("bos", "eos", "unk")} if GPT2_EOD in vocab else {}
    )
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False,
              "model_max_length": positions, **names}  # fmt: skip
    return {
        "vocab.json": vocab_bytes,
        "merges.txt": merge_bytes,
        "tokenizer.json": json.dumps(whole, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
        "special_tokens_map.json": json.dumps(names, indent=2).encode(),
        **{name: content for name, content in beside.items() if name in ALONG},
    }
