"""Tools that use a model say where a text leaves the trained length, and what its scaling goes by."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from megatron_lite.cli import chat, evaluate, generate, serve
from megatron_lite.inference.model import load_model
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


def test_a_conversation_and_a_server_beyond_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("llama").save_pretrained(tmp_path)
    tokenizer_files(tmp_path, "vocab.json", "merges.txt")
    monkeypatch.setattr(sys, "stdin", io.StringIO("q\n" + 2 * ("q" * 30 + "\n")))
    words = ["--load", tmp_path, "--use-cpu", "--max-new-tokens", 2, "--temperature", 0]
    assert tool(chat.main, monkeypatch, *words) == 0
    err = capsys.readouterr().err
    assert err.count("more than the 24 that this model was trained for") == 1
    assert "WARNING: the conversation: " in err
    model = load_model(tmp_path).model
    for wanted, told in ((24, False), (30, True)):
        assert serve._longest(wanted, model) == wanted
        warning = "WARNING: --max-length: 30 tokens are 6 more than the 24"
        assert (warning in capsys.readouterr().err) == told
