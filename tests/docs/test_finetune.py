"""The guide on fine-tuning: its commands are run as they are printed, and its translation has the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.walking import blocks, in_shell, read
from tests.support.extras import needs
from tests.support.huggingface import gpt2, tokenizer_files

GUIDES = ("finetune", "finetune.zh-CN")


def of(guide: str, language: str) -> list[str]:
    return [code for kind, code in blocks(read(guide)) if kind == language]


def test_the_translation_has_the_same_commands_and_pictures() -> None:
    for language in ("bash", "text"):
        assert of(GUIDES[0], language) == of(GUIDES[1], language)
        assert len(of(GUIDES[0], language)) == 2


@pytest.mark.slow
def test_every_command_of_the_guide_runs_and_looks_like_it_says(tmp_path: Path) -> None:
    """From a model of random weights: it learns two talks by heart."""
    transformers = needs("transformers")
    gpt2(n_positions=128).save_pretrained(tmp_path / "model")
    tokenizer_files(tmp_path / "model", "vocab.json", "merges.txt")
    prepared, tuned = in_shell(of(GUIDES[0], "bash"), tmp_path)
    pictures = [
        re.sub(r"[\d.]+", "N", line) for line in "".join(of(GUIDES[0], "text")).splitlines()
    ]
    found = [re.sub(r"[\d.]+", "N", line) for line in (*prepared, *tuned)]
    assert [line for line in pictures if "..." not in line and "NN" not in line and line not in found
            and "iteration" not in line] == []  # fmt: skip
    assert "A small model." in tuned
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned-hf")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}])
