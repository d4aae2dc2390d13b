"""The fastest engine runs only where it gives the reference's ids; otherwise the next, visibly."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.data.tokenizers import engines
from megatron_lite.data.tokenizers.base import read_vocab
from megatron_lite.data.tokenizers.engines import (
    Candidate,
    Encoded,
    EngineChoice,
    FunctionEngine,
    GigatokenEngine,
    Unavailable,
)
from megatron_lite.data.tokenizers.gpt2_bpe import (
    GPT2_EOD,
    GPT2BPETokenizer,
    gpt2_tokenizer_json,
    read_merges,
)
from tests.data.texts import SENTENCES, hard_texts
from tests.support.extras import needs

LIBRARIES = ("gigatoken", "tiktoken", "tokenizers")


def installed() -> list[str]:
    return [name for name in LIBRARIES if __import__("importlib.util").util.find_spec(name)]


@pytest.mark.parametrize("step", [211, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", LIBRARIES)
def test_every_engine_gives_the_ids_of_the_plain_one(
    files: tuple[str, str], engine: str, step: int
) -> None:
    needs("regex")
    needs(engine)
    texts = hard_texts(step)
    expected = GPT2BPETokenizer(*files, engine="plain").encode_batch(texts)
    found = GPT2BPETokenizer(*files, engine=engine).encode_batch(texts)
    assert np.array_equal(found.lengths, expected.lengths)
    assert np.array_equal(found.ids, expected.ids)


def test_the_fastest_installed_engine_is_chosen_and_said(files: tuple[str, str]) -> None:
    needs("gigatoken")
    text = GPT2BPETokenizer(*files).choice
    assert text.engine.name.startswith("gigatoken ") and text.engine.threaded
    assert "ids equal tokenizers " in text.describe()


@pytest.mark.parametrize("absent", [("gigatoken",), ("gigatoken", "tiktoken"), LIBRARIES])
def test_what_is_not_installed_is_named_with_its_extra(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch, absent: Sequence[str]
) -> None:
    needs("regex")
    rest = [name for name in installed() if name not in absent] or ["plain"]
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    choice = GPT2BPETokenizer(*files).choice
    assert choice.engine.name.split()[0] == rest[0]
    for name in absent:
        assert f"{name} is not installed (pip install -e '.[" in choice.describe()


class Lying:
    """Gives the plain ids, but for texts that hold a certain word."""

    name, threaded = "lying 1.0", True

    def __init__(self, word: str) -> None:
        self.word = word

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        ids = [[ord(c) for c in text.replace(self.word, self.word[::-1])] for text in texts]
        lengths = np.array([len(part) for part in ids], np.int64)
        return Encoded(np.array([i for part in ids for i in part], np.int32), lengths)


def choice_with(word: str) -> EngineChoice:
    plain = FunctionEngine("plain", lambda text: [ord(c) for c in text])
    return EngineChoice(
        [Candidate("lying", lambda: Lying(word)), Candidate("plain", lambda: plain)],
        reference=("plain",),
    )


@pytest.mark.parametrize("odd", ["字Ġ", "\ud800"])
def test_a_vocabulary_is_the_same_json_with_and_without_orjson(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    vocab, merges = read_vocab(files[0]), read_merges(files[1])
    vocab[odd] = len(vocab)  # orjson refuses half of a UTF-16 pair
    fast = json.loads(gpt2_tokenizer_json(vocab, merges))
    monkeypatch.setitem(sys.modules, "orjson", None)
    assert json.loads(gpt2_tokenizer_json(vocab, merges)) == fast
    assert fast["model"]["vocab"] == vocab
    assert fast["model"]["merges"] == [list(pair) for pair in merges]


def test_an_engine_that_differs_on_hard_strings_is_not_used() -> None:
    choice = choice_with("don't")
    assert choice.engine.name == "plain"
    assert "lying 1.0 is not used: " in choice.describe() and "at token" in choice.describe()


def test_an_engine_that_differs_on_the_input_is_replaced_at_the_start() -> None:
    choice = choice_with("rare word")
    assert choice.engine.name == "lying 1.0"
    choice.check(["fine", "a rare word"])
    assert choice.engine.name == "plain" and "'a rare word' parts from plain" in choice.describe()


def test_an_engine_that_differs_later_stops_the_run_with_the_way_out() -> None:
    choice = choice_with("rare word")
    choice.check(["fine"])
    choice.check_again("fine, too")
    with pytest.raises(DataError, match="lying 1.0 disagrees.*--tokenizer-engine plain"):
        choice.check_again("a rare word")


def test_an_engine_that_cannot_do_it_is_refused_by_name(files: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="--tokenizer-engine sentencepiece cannot.*gigatoken"):
        GPT2BPETokenizer(*files, engine="sentencepiece")

    def broken() -> Lying:
        raise Unavailable("not today")

    with pytest.raises(ConfigError, match="no engine.*not today"):
        _ = EngineChoice([Candidate("x", broken)], reference=("x",)).engine


def test_ids_in_another_order_than_the_merges_are_not_left_to_tiktoken(
    files: tuple[str, str], tmp_path: Path
) -> None:
    needs("tiktoken")
    vocab = json.loads(Path(files[0]).read_text(encoding="utf-8"))
    top = len(vocab) - 1
    swapped = {name: top - number for name, number in vocab.items()}
    (tmp_path / "v.json").write_text(json.dumps(swapped), encoding="utf-8")
    with pytest.raises(ConfigError, match="in another order"):
        _ = GPT2BPETokenizer(str(tmp_path / "v.json"), files[1], engine="tiktoken").choice.engine
    tokenizer = GPT2BPETokenizer(str(tmp_path / "v.json"), files[1])
    expected = [top - i for i in GPT2BPETokenizer(*files).encode_batch(SENTENCES).ids.tolist()]
    assert tokenizer.encode_batch(SENTENCES).ids.tolist() == expected


def test_gigatoken_starts_anew_when_its_cache_has_grown_and_gives_the_same(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("gigatoken")
    vocab = json.loads(Path(files[0]).read_text(encoding="utf-8"))
    del vocab[GPT2_EOD]
    merges = [
        tuple(line.split(" "))
        for line in Path(files[1]).read_text(encoding="utf-8").split("\n")[1:-1]
    ]
    loads = []
    content = gpt2_tokenizer_json(vocab, merges)  # type: ignore[arg-type]

    def load(kind: object) -> object:
        loads.append(1)
        return kind.from_json(content)  # type: ignore[attr-defined]

    engine = GigatokenEngine(load)
    first = engine.encode_batch(SENTENCES)
    assert len(loads) == 1
    monkeypatch.setattr(engines, "CACHE_BYTES", -(1 << 40))
    engine.encode_batch(SENTENCES)
    assert len(loads) == 2
    assert engine.encode_batch(SENTENCES).ids.tolist() == first.ids.tolist()
