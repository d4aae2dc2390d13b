"""generate.py and evaluate.py say where a text leaves the trained length, and what its scaling goes by."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.cli import evaluate, generate
from tests.support.extras import needs
from tests.support.families import tiny
from tests.support.huggingface import tokenizer_files, tool

needs("transformers")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("default", "WARNING: 32 tokens are 8 more than the 24 that this model was trained for"),
        ("dynamic", "--rope-scaling-type dynamic: positions are scaled as beyond 24 tokens, for a text of 32"),
    ],
)  # fmt: skip
def test_a_continuation_beyond_the_trained_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, told: str
) -> None:  # fmt: skip
    said = {"rope_type": kind, "rope_theta": 1e4} | ({"factor": 2.0} if kind == "dynamic" else {})
    tiny("llama", rope_parameters=said).save_pretrained(tmp_path)
    tokenizer_files(tmp_path, "vocab.json", "merges.txt")
    words = ["--load", tmp_path, "--use-cpu", "--prompt", "qqqqqqqq", "--max-new-tokens"]
    assert tool(generate.main, monkeypatch, *words, 24) == 0
    assert told in capsys.readouterr().err
    assert tool(generate.main, monkeypatch, *words, 16) == 0
    assert "WARNING: 24" not in (err := capsys.readouterr().err)
    assert ("positions are as in texts up to 24 tokens" in err) == (kind == "dynamic")


def test_a_window_beyond_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("llama").save_pretrained(tmp_path)
    tokenizer_files(tmp_path, "vocab.json", "merges.txt")
    text = tmp_path / "text"
    text.write_text("q" * 40)
    for window, told in ((24, False), (30, True)):
        words = ["--load", tmp_path, "--use-cpu", "--text", text, "--window", window]
        assert tool(evaluate.main, monkeypatch, *words) == 0
        warning = (
            "WARNING: --window: 30 tokens are 6 more than the 24 that this model was trained for"
        )
        assert (warning in capsys.readouterr().err) == told
