"""convert.py holds rows, ids, special tokens, ends and positions against each other, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.cli import convert
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2_EOD
from tests.support.huggingface import MERGES, Change, gpt2, setting, tool
from tests.support.tokenizers import hugging_face
from tests.train.runs import alone

pytestmark = pytest.mark.ci  # every folder of Hugging Face's takes a third of a second

Capture = pytest.CaptureFixture[str]


def put(name: str, content: object) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(content))


def smaller(folder: Path) -> None:
    """A model with a row less than the tokenizer has ids."""
    gpt2(vocab_size=261, eos_token_id=260, bos_token_id=260).save_pretrained(folder)


def larger(folder: Path) -> None:
    gpt2(vocab_size=270).save_pretrained(folder)


def of_another(folder: Path) -> None:
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab["the"], vocab["in"] = vocab["in"], vocab["the"]
    put("tokenizer.json", {"model": {"type": "BPE", "vocab": vocab, "merges": []}})(folder)


def half(folder: Path) -> None:
    lines = [f"{a} {b}" for a, b in MERGES[:2]]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (smaller, "gives 262 ids, up to 261 for '<|endoftext|>', but the model has 261 rows"),
        (put("added_tokens.json", {"<pad>": 262}), "gives 263 ids, up to 262 for '<pad>'"),
        (put("tokenizer_config.json", {"added_tokens_decoder": {"300": {"content": "<x>"}}}),
         "gives 301 ids"),
        (of_another, "the token 'the' has the id 257 by vocab.json and 259 by tokenizer.json"),
        (put("tokenizer_config.json", {"eos_token": "</s>"}), "names the eos_token '</s>', which none"),
        (put("tokenizer_config.json", {"eos_token": "th"}), "GPT2BPETokenizer ends documents with"),
        (setting(eos_token_id=5), "end with id 5 by config.json (eos_token_id) and with id 261"),
        (setting(eos_token_id=[5, 7]), "end with id 5, 7 by config.json"),
        (setting(eos_token_id=999), "eos_token_id 999 in config.json is no row of 262"),
        (half, "its 2 merges makes 3 of"),
    ],
    ids=["rows", "added", "decoder", "two vocabularies", "no eos", "another eos", "two ends",
         "two lists of ends", "no row", "half"],
)  # fmt: skip
def test_what_contradicts_itself_is_not_imported(
    tmp_path: Path, monkeypatch, folder: Path, capsys: Capture, change: Change, said: str
) -> None:
    change(folder)
    assert tool(convert.main, monkeypatch, folder, tmp_path / "ours") == 4
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err, err
    assert not (tmp_path / "ours").exists()
    if "--no-tokenizer" in err:
        assert tool(convert.main, monkeypatch, folder, tmp_path / "ours", "--no-tokenizer") == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (larger, "the model has 270 rows, the tokenizer gives 262 ids: the last 8 rows stand"),
        (setting(eos_token_id=50256), "eos_token_id 50256, GPT2Config's default, is left out"),
        (put("tokenizer_config.json", {"model_max_length": 2048}), "the model has 24 positions"),
        (put("special_tokens_map.json", {"pad_token": "<p>"}), "the pad_token '<p>', which is no"),
        (setting(eos_token_id=[5, 261]), f"end of document: id 261, '{GPT2_EOD}'"),
        (put("tokenizer_config.json", {"model_max_length": 1e30}), "end of document: id 261"),
    ],
    ids=["rows", "default eos", "positions", "pad", "one of two ends", "endless"],
)
def test_what_only_differs_is_said(
    tmp_path: Path, monkeypatch, folder: Path, capsys: Capture, change: Change, said: str
) -> None:
    change(folder)
    assert tool(convert.main, monkeypatch, folder, tmp_path / "ours") == 0
    assert said in capsys.readouterr().out
    facts = read_manifest(tmp_path / "ours" / "iter_0000000").tokenizer
    assert facts["eod"] == 261 and facts["type"] == "GPT2BPETokenizer" and facts["fingerprint"]
    assert tool(convert.main, monkeypatch, tmp_path / "ours", tmp_path / "out") == 0
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert out["eos_token_id"] == out["bos_token_id"] == 261


def test_an_end_that_only_config_json_knows_comes_out_again(
    tmp_path: Path, monkeypatch, folder: Path
) -> None:
    setting(eos_token_id=7)(folder)
    ours, out = tmp_path / "ours", tmp_path / "out"
    assert tool(convert.main, monkeypatch, folder, ours, "--no-tokenizer") == 0
    assert tool(convert.main, monkeypatch, ours, out) == 0
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 7


@pytest.mark.parametrize("words", [[], ["--no-tokenizer"]])
def test_an_export_takes_the_end_that_the_checkpoint_knows(
    tmp_path: Path, monkeypatch, capsys: Capture, words: list[str]
) -> None:
    (tmp_path / "words").mkdir()
    data = hugging_face(tmp_path / "words")
    made = ["--tokenizer-type", data.tokenizer_type, "--tokenizer-model", str(data.tokenizer_model)]
    run, out = tmp_path / "run", tmp_path / "out"
    done = alone("--mock-data", *made, "--save", str(run), "--save-interval", "2", "--train-iters", "2",
                 without=["--vocab-size"])  # fmt: skip
    assert done.rc == 0, done.err
    assert read_manifest(run / "iter_0000002").tokenizer["eod"] == 4
    assert tool(convert.main, monkeypatch, run, out, *words) == 0
    assert "end of document: id 4" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 4
    assert (out / "tokenizer.json").exists() == (not words)


def test_a_foreign_vocabulary_is_not_exported(
    tmp_path: Path, monkeypatch, folder: Path, capsys: Capture
) -> None:
    ours = tmp_path / "ours"
    assert tool(convert.main, monkeypatch, folder, ours) == 0
    names = [*json.loads((folder / "vocab.json").read_text())]
    vocab = tmp_path / "foreign.json"
    vocab.write_text(json.dumps({name: n for n, name in enumerate(reversed(names))}))
    words = [ours, tmp_path / "out", "--vocab-file", vocab, "--merge-file", folder / "merges.txt"]
    capsys.readouterr()
    assert tool(convert.main, monkeypatch, *words) == 4
    err = capsys.readouterr().err
    assert "of 262 ids, was trained with GPT2BPETokenizer" in err and f"{vocab} (262 ids" in err
    assert tool(convert.main, monkeypatch, *words, "--allow-tokenizer-mismatch") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 0
