"""The unigram perplexity equals a hand-worked one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.data.indexed_builder import IndexedDatasetBuilder

TOOL = Path(__file__).resolve().parents[2] / "tools/unigram.py"


def write(prefix: Path, documents: list[list[int]]) -> str:
    with IndexedDatasetBuilder(prefix.with_suffix(".bin")) as builder:
        for document in documents:
            builder.add_document(document, [len(document)])
        builder.finalize()
    return str(prefix)


def unigram(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=60
    )


def test_one_file_equals_the_counts_by_hand(tmp_path: Path) -> None:
    # 2 documents train, 1 validation, 1 test; ids 0..3, so 4 added to the 5 training tokens
    prefix = write(tmp_path / "one", [[0, 0, 1], [2, 0], [3, 3, 3], [0, 3]])
    out = tmp_path / "out.json"
    done = unigram("--data-path", prefix, "--split", "50,25,25", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["loss"] == pytest.approx(-(math.log(4 / 9) + math.log(1 / 9)) / 2, rel=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-12)
    assert (found["vocab_size"], found["train_tokens"], found["held_out_tokens"]) == (4, 5, 2)
    assert f"PPL {found['perplexity']:.6E}" in done.stdout


def test_a_blend_predicts_and_counts_by_its_weights(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [[0, 0], [1]])
    b = write(tmp_path / "b", [[1, 1, 1], [0, 1]])
    out = tmp_path / "out.json"
    done = unigram("--data-path", "3", a, "1", b, "--split", "50,0,50", "--json", str(out))
    assert done.returncode == 0, done.stderr
    # a: (3/4, 1/4) of 2 tokens + 2, b: (1/5, 4/5) of 3 tokens + 2
    p0, p1 = 0.75 * 3 / 4 + 0.25 * 1 / 5, 0.75 * 1 / 4 + 0.25 * 4 / 5
    loss = -0.75 * math.log(p1) - 0.25 * (math.log(p0) + math.log(p1)) / 2
    assert json.loads(out.read_text())["loss"] == pytest.approx(loss, rel=1e-12)


def test_validation_can_be_asked_for(tmp_path: Path) -> None:
    prefix = write(tmp_path / "one", [[0, 0, 1], [2, 0], [3, 3, 3], [0, 3]])
    done = unigram("--data-path", prefix, "--split", "50,25,25", "--held-out", "valid")
    assert f"PPL {9.0:.6E}" in done.stdout


def test_an_empty_split_is_refused_with_the_file_and_the_way_out(tmp_path: Path) -> None:
    prefix = write(tmp_path / "one", [[0, 0, 1], [2, 0]])
    done = unigram("--data-path", prefix, "--split", "100,0,0")
    assert done.returncode == 3
    assert "one: its test split is empty" in done.stderr and "--split" in done.stderr


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "one", [[0, 9], [2, 0]])
    done = unigram("--data-path", prefix, "--split", "50,0,50", "--vocab-size", "8")
    assert done.returncode == 3 and "id 9 is not below 8 ids" in done.stderr
