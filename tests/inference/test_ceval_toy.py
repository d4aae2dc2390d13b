"""ceval-toy: a rule that training texts show and C-Eval's files ask for; who has learnt it answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.cli import evaluate
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2BPETokenizer
from tests.support.ceval_toy import GROUPS, texts, write_exam, write_tokenizer
from tests.support.corpora import write_pair
from tests.support.huggingface import tool
from tests.train.runs import run_main

STEPS, BATCH, LENGTH = 300, 8, 256


def trained(place: Path, name: str, *words: str) -> Path:
    """A run of the trainer on the texts."""
    done = run_main(
        "--use-cpu", "--num-layers", "1", "--hidden-size", "64", "--num-attention-heads", "4",
        "--seq-length", str(LENGTH), "--position-embedding-type", "rope", "--no-position-embedding",
        "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--init-method-std", "0.1",
        "--attention-dropout", "0", "--hidden-dropout", "0", "--num-workers", "0",
        "--micro-batch-size", str(BATCH), "--global-batch-size", str(BATCH),
        "--vocab-file", str(place / "vocab.json"), "--merge-file", str(place / "merges.txt"),
        "--data-path", str(place / "texts"), "--split", "1,0,0", "--eval-iters", "0", "--adam-beta2", "0.95",
        "--lr-decay-style", "cosine", "--save", str(place / name), *words,
    )  # fmt: skip
    assert done.rc == 0, done.err
    return place / name


def asked(load: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the exam found, by the tool."""
    file = place / "found.json"
    words = ["--load", load, "--ceval", place / "exam", "--json", file, "--use-cpu"]
    assert tool(evaluate.main, monkeypatch, *words) == 0
    (found,) = json.loads(file.read_text())["results"]
    return dict(found)


@pytest.mark.slow
def test_who_has_learnt_the_rule_answers_and_others_guess(tmp_path: Path, monkeypatch) -> None:
    vocab, merges = write_tokenizer(tmp_path)
    write_exam(tmp_path / "exam")
    tokenizer = GPT2BPETokenizer(str(vocab), str(merges))
    documents = [[*tokenizer.encode(text), tokenizer.eod] for text in texts(STEPS * BATCH // 2)]
    write_pair(tmp_path / "texts", documents)
    new = trained(tmp_path, "new", "--train-iters", "1", "--lr", "1e-9", "--min-lr", "1e-9")
    guessed = asked(new, tmp_path, monkeypatch)
    assert guessed["average"] == pytest.approx(0.25, abs=0.1)
    words = ["--train-iters", str(STEPS), "--lr", "5e-3", "--lr-warmup-iters", "20"]
    old = trained(tmp_path, "old", *words)
    known = asked(old, tmp_path, monkeypatch)
    assert known["average"] >= 0.9
    assert (known["shots"], known["questions"], known["shortened"]) == (5, 120, 0)
    assert set(known["subjects"]) == set(GROUPS) and set(known["groups"]) == {"one", "two"}
