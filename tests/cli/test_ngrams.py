"""The perplexities of counting models equal hand-worked ones and a second, plain implementation."""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.cli import ngrams
from megatron_lite.config.exit import run_tool
from megatron_lite.data.ngrams import NgramModel, count
from tests.support.corpora import write_pair


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ngrams.py", *arguments])
    return run_tool(ngrams.main)


def plain(train: list[list[int]], test: list[int], order: int, size: int) -> list[float]:
    """Kneser-Ney by dictionaries, one token at a time: the definition, written down."""
    levels: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order)]
    raw = [
        Counter(
            tuple(stream[place : place + n])
            for stream in train
            for place in range(len(stream) - n + 1)
        )
        for n in range(1, order + 1)
    ]
    levels[-1] = raw[-1]
    for n in range(order - 1):
        levels[n] = Counter(gram[1:] for gram in raw[n + 1])

    def probability(history: tuple[int, ...], token: int) -> float:
        if len(history) == 0:
            lower = 1 / size
        else:
            lower = probability(history[1:], token)
        table = levels[len(history)]
        once, twice = (sum(1 for c in table.values() if c == times) for times in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.5
        same = {gram: c for gram, c in table.items() if gram[:-1] == history}
        if not same:
            return lower
        found = max(same.get((*history, token), 0) - discount, 0)
        return (found + discount * len(same) * lower) / sum(same.values())

    return [
        probability(tuple(test[max(0, place - order + 1) : place]), token)
        for place, token in enumerate(test)
    ]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_order_equals_the_plain_definition(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blend of two files; pieces of a few tokens, so that n-grams cross from one to the next."""
    monkeypatch.setattr(ngrams, "_PIECE", 7)
    draw = random.Random(seed)
    files = [
        [[draw.choice([0, 0, 0, 1, 1, 2, 3, 4]) for _ in range(draw.randint(0, 9))]
         for _ in range(30)] + [[0, 1]] for _ in range(2)
    ]  # fmt: skip
    a, b = (write_pair(tmp_path / name, file) for name, file in zip("ab", files, strict=True))
    out = tmp_path / "out.json"
    data = ["--data-path", "1", a, "3", b, "--split", "80,0,20", "--vocab-size", "6"]
    assert call(monkeypatch, *data, "--json", str(out)) == 0
    found = json.loads(out.read_text())
    train = [[token for document in file[:25] for token in document] for file in files]
    tests = [[token for document in file[25:] for token in document] for file in files]
    for order, name in enumerate(("unigram", "bigram", "trigram"), start=1):
        losses = [-np.log(plain(train, test, order, 6)).mean() for test in tests]
        expected = 0.25 * losses[0] + 0.75 * losses[1]
        assert found["models"][name]["loss"] == pytest.approx(expected, rel=1e-12), name
        assert found["models"][name]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-12)
    assert found["train_tokens"] == sum(map(len, train))
    assert found["held_out_tokens"] == sum(map(len, tests))


def test_a_bigram_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # trains on 0 1 0 1 0 2: bigrams 01 twice, 10 twice, 02 once; discount 1 / (1 + 2 * 2) = 1/5
    # contexts: one for each of 0, 1, 2, so the discount below is 3 / (3 + 0) = 1: uniform over 3
    prefix = write_pair(tmp_path / "one", [[0, 1, 0, 1], [0, 2], [1, 0]])
    arguments = ["--data-path", prefix, "--split", "67,33,0", "--held-out", "valid"]
    assert call(monkeypatch, *arguments, "--max-order", "2") == 0
    first, second = 1 / 3, (2 - 1 / 5 + 1 / 5 / 3) / 2
    loss = -(math.log(first) + math.log(second)) / 2
    said = capsys.readouterr().out
    assert f"bigram on the valid split: loss {loss:.6E} | PPL {math.exp(loss):.6E}" in said
    assert "trigram" not in said and "3 ids | 6 training tokens | 2 held-out tokens" in said


def test_probabilities_of_all_tokens_sum_to_one() -> None:
    stream = np.array([0, 3, 0, 3, 1, 0, 3, 2, 2, 0], np.int64)
    tables = [count([iter([stream])], order, 5) for order in (1, 2, 3)]
    for order in (1, 2, 3):
        model = NgramModel(tables[:order], 5)
        for context in ([0, 3], [4, 4], [2, 0]):
            ends = [model.probabilities(np.array([*context, token]))[-1] for token in range(5)]
            assert sum(ends) == pytest.approx(1, rel=1e-12) and min(ends) > 0


def test_an_empty_split_is_refused_with_the_file_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_pair(tmp_path / "one", [[0, 0, 1], [2, 0]])
    for split in ("100,0,0", "99,0,1"):
        assert call(monkeypatch, "--data-path", prefix, "--split", split) == 3
        said = capsys.readouterr().err
        assert "one: its valid split is empty" in said and "--split" in said
        assert call(monkeypatch, "--data-path", prefix, "--split", split, "--held-out", "test") == 3
        assert "one: its test split is empty" in capsys.readouterr().err


def test_validation_is_held_out_where_a_file_has_nothing_for_testing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_pair(tmp_path / "one", [[0, 0, 1], [2, 0], [1, 0]])
    assert call(monkeypatch, "--data-path", prefix, "--split", "67,33,0") == 0
    assert "bigram on the valid split" in capsys.readouterr().out
    assert call(monkeypatch, "--data-path", prefix, "--split", "34,33,33") == 0
    assert "bigram on the test split" in capsys.readouterr().out


def test_ids_beyond_the_vocabulary_and_keys_beyond_a_word_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_pair(tmp_path / "one", [[0, 9], [2, 0]])
    data = ["--data-path", prefix, "--split", "50,0,50", "--vocab-size"]
    assert call(monkeypatch, *data, "8") == 3
    assert "id 9 is not below 8 ids" in capsys.readouterr().err
    assert call(monkeypatch, *data, str(1 << 21)) == 2
    assert "--max-order 3 of 2097152 ids" in capsys.readouterr().err
    assert call(monkeypatch, *data, str(1 << 21), "--max-order", "2") == 0
