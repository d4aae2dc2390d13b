"""The guide on using a model: its commands are run as they are printed, and its translation has the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.docs.walking import blocks, in_shell, read
from tests.support.extras import needs
from tests.support.huggingface import gpt2, tokenizer_files
from tests.support.places import ROOT

GUIDES = ("use-a-model", "use-a-model.zh-CN")


def commands(guide: str) -> list[str]:
    return [code for language, code in blocks(read(guide)) if language == "bash"]


def test_the_translation_has_the_same_commands() -> None:
    assert commands(GUIDES[0]) == commands(GUIDES[1])
    assert len(commands(GUIDES[0])) == 3


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_readme_has_the_first_of_them(readme: str) -> None:
    assert commands(GUIDES[0])[0] in (ROOT / readme).read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_command_of_the_guide_runs(tmp_path: Path) -> None:
    """But for `make setup`, which has been called where this test is run; a model of random weights answers."""
    needs("transformers")
    gpt2(n_positions=128).save_pretrained(tmp_path / "model")
    tokenizer_files(tmp_path / "model", "vocab.json", "merges.txt")
    (tmp_path / "story.txt").write_text("It was a dark\nand stormy night")
    (tmp_path / "prompts.txt").write_text("one\nanother one\n")
    codes = [
        code.replace("make setup && source .venv/bin/activate\n", "")
        for code in commands(GUIDES[0])
    ]
    assert sum(map(len, codes)) < sum(map(len, commands(GUIDES[0])))
    first, texts, talk = in_shell(["exec </dev/null\n" + codes[0], *codes[1:]], tmp_path)
    assert first[0].startswith("The sea is")
    samples = [json.loads(line) for line in texts[:4]]
    assert [(one["prompt"], one["sample"]) for one in samples] == [
        ("The sea", 0), ("A longer prompt", 0), ("The sea", 1), ("A longer prompt", 1)
    ]  # fmt: skip
    assert "and stormy night" in "\n".join(texts[4:]) and talk
    said = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [one["role"] for one in said] == ["system", "user", "assistant"]
