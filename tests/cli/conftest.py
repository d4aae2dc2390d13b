"""What the tools that read folders of Hugging Face's are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.huggingface import gpt2, tokenizer_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of Hugging Face's of 262 rows with its tokenizer of 262 ids."""
    path = tmp_path / "gpt2"
    gpt2().save_pretrained(path)
    tokenizer_files(path, "vocab.json", "merges.txt")
    return path
