"""A tokenizer kept beside a checkpoint is the same tokenizer, when the original is gone."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from megatron_lite.config.errors import DataError
from megatron_lite.data.tokenizers.build import TOKENIZERS, build_tokenizer
from megatron_lite.data.tokenizers.kept import files_to_keep, from_kept
from tests.support.tokenizers import (
    KINDS,
    gpt2,
)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_kept_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    original, kept = tmp_path / "original", tmp_path / "kept"
    original.mkdir()
    kept.mkdir()
    data = KINDS[kind](original)
    text = "1 2 3" if kind == "NullTokenizer" else "the"
    first = build_tokenizer(data, vocab_size=300)
    expected = (first.encode(text), first.vocab_size, first.eod, first.fingerprint())
    for name, content in files_to_keep(data).items():
        (kept / name).write_bytes(content)
    shutil.rmtree(original)
    if kind != "NullTokenizer":
        with pytest.raises(DataError):
            build_tokenizer(data, vocab_size=300)
    again = build_tokenizer(from_kept(data, kept), vocab_size=300)
    assert (again.encode(text), again.vocab_size, again.eod, again.fingerprint()) == expected


def test_without_kept_files_the_config_says_where_they_are(tmp_path: Path) -> None:
    data = gpt2(tmp_path)
    assert from_kept(data, tmp_path / "nothing") == data


@pytest.mark.parametrize("kind", ["GPT2BPETokenizer", "HuggingFaceTokenizer", "Llama2Tokenizer"])
def test_what_came_beside_a_model_is_kept_for_its_export(kind: str, tmp_path: Path) -> None:
    """A chat template above all; of a user's own folder nothing but the tokenizer."""
    data = KINDS[kind](tmp_path)
    names = {
        "GPT2BPETokenizer": {"vocab_file": "vocab.json", "merge_file": "merges.txt"},
        "HuggingFaceTokenizer": {},
        "Llama2Tokenizer": {"tokenizer_model": "tokenizer.model"},
    }[kind]
    alone = set(files_to_keep(data))
    paths = {field: tmp_path / name for field, name in names.items()}
    for field, path in paths.items():
        Path(getattr(data, field)).rename(path)
    data = dataclasses.replace(data, **{field: str(path) for field, path in paths.items()})
    for name in ("chat_template.jinja", "generation_config.json", "notes.txt"):
        (tmp_path / name).write_text("{}")
    if kind != "HuggingFaceTokenizer":
        assert len(alone) == len(paths)
    kept = files_to_keep(data)
    assert {"chat_template.jinja", "generation_config.json"} <= set(kept)
    assert "notes.txt" not in kept
