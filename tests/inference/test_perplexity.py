"""Perplexity through a sliding window: by hand, by transformers, and the same in every layout."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lite.config.errors import ConfigError, DataError, NumericsError
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2_EOD, byte_characters
from megatron_lite.inference.evaluating.corpora import (
    PerplexityOf,
    num_scored,
    pair_documents,
)
from megatron_lite.inference.evaluating.examinee import Examinee
from megatron_lite.inference.evaluating.perplexity import (
    Document,
    Perplexity,
    choose_window,
    measure_perplexity,
    window_rows,
    windows_over,
)
from megatron_lite.inference.evaluating.scorer import Scorer
from megatron_lite.inference.model import build_model, find_model, load_model
from megatron_lite.parallel.context import ParallelContext
from tests.support.corpora import write_pair
from tests.support.extras import needs
from tests.support.families import TINY, tiny
from tests.support.huggingface import gpt2, tokenizer_files

SENTENCE = "the thin inner hint that this ether tin, the thing in other words then."


def write(path: Path, **changes: object) -> Path:
    """A GPT-2 whose heads two ranks can share, with its tokenizer."""
    needs("transformers")  # not above: the ranks of a layout need none
    gpt2(n_head=4, **changes).save_pretrained(path)
    tokenizer_files(path, "vocab.json", "merges.txt")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "gpt2")


def measured(
    path: Path, documents: list[list[int]], window: int, stride: int, batch_size: int = 8
) -> Perplexity:  # fmt: skip
    ctx = ParallelContext.serial()
    model = build_model(find_model(path, ctx), ctx, dtype=torch.float32)
    given = [Document(np.array(tokens), 10 * len(tokens)) for tokens in documents]
    scorer = Scorer(model, batch_size)
    return measure_perplexity(scorer, "some", given, window=window, stride=stride)


def test_the_windows_of_ten_tokens_by_hand() -> None:
    """Nine inputs, each of which predicts the next token."""
    assert list(windows_over(9, 4, 2)) == [(0, 4, 4), (2, 6, 2), (4, 8, 2), (6, 9, 1)]
    assert list(windows_over(9, 4, 4)) == [(0, 4, 4), (4, 8, 4), (8, 9, 1)]
    assert list(windows_over(9, 100, 3)) == [(0, 9, 9)] and list(windows_over(0, 4, 2)) == []
    rows = list(window_rows(np.arange(100, 110), 4, 2))
    assert [row.tokens.tolist() for row in rows] == [
        [100, 101, 102, 103], [102, 103, 104, 105], [104, 105, 106, 107], [106, 107, 108]]  # fmt: skip
    assert [row.targets.tolist() for row in rows] == [
        [101, 102, 103, 104], [105, 106], [107, 108], [109]]  # fmt: skip
    assert [row.positions.tolist() for row in rows] == [[0, 1, 2, 3], [2, 3], [2, 3], [2]]


def test_every_token_is_scored_once_and_sees_what_was_promised() -> None:
    for length, window in itertools.product(range(2, 23), range(1, 9)):
        for stride in range(1, window + 1):
            tokens = np.arange(length)
            targets = []
            for number, row in enumerate(window_rows(tokens, window, stride)):
                assert len(row.tokens) <= window
                for position, target in zip(row.positions, row.targets, strict=True):
                    assert row.tokens[position] == target - 1
                    seen = position + 1
                    assert seen == target or number and window - stride + 1 <= seen <= window
                targets += row.targets.tolist()
            assert targets == list(range(1, length))


def test_it_is_what_transformers_say_window_by_window(folder: Path) -> None:
    model = gpt2(n_head=4)
    tokens = torch.randint(0, 262, (41,), generator=torch.Generator().manual_seed(3))
    expected, likeliest, begin, done = 0.0, 0, 0, 0
    while done < 40:  # in transformers' own words: the last targets of each window of 10
        end = min(begin + 10, 40)
        with torch.no_grad():
            chances = model(tokens[None, begin:end]).logits[0].double().log_softmax(-1)
        for target in range(done + 1, end + 1):
            expected -= float(chances[target - 1 - begin, tokens[target]])
            likeliest += int(chances[target - 1 - begin].argmax() == tokens[target])
        begin, done = begin + 4, end
    found = measured(folder, [tokens.tolist()], 10, 4)
    assert found.nats == pytest.approx(expected, rel=1e-6)
    assert (found.tokens, found.windows, found.likeliest) == (40, 9, likeliest)
    assert found.perplexity == pytest.approx(math.exp(expected / 40), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / 410, rel=1e-6)


DOCUMENTS = [[261, *(n * n % 261 for n in range(k))] for k in (33, 1, 0, 7, 24, 25, 60)]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_no_batch_changes_a_number(folder: Path, batch_size: int) -> None:
    one = measured(folder, DOCUMENTS, 24, 7)
    other = measured(folder, DOCUMENTS, 24, 7, batch_size=batch_size)
    assert other.nats == pytest.approx(one.nats, rel=1e-7)
    assert (other.tokens, other.windows, other.likeliest) == (
        one.tokens,
        one.windows,
        one.likeliest,
    )
    assert one.tokens == 33 + 1 + 7 + 24 + 25 + 60 and one.documents == 6  # the empty one is none


@pytest.mark.ci
@pytest.mark.parametrize("name", TINY)
def test_every_family_is_scored_as_transformers_do(tmp_path: Path, name: str) -> None:
    needs("transformers")
    model = tiny(name)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 263, (24,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        chances = model(tokens[None]).logits[0, :-1].double().log_softmax(-1)
    expected = -float(chances.gather(1, tokens[1:, None]).sum())
    assert measured(tmp_path, [tokens.tolist()], 24, 24).nats == pytest.approx(expected, rel=1e-5)


def examinee(path: Path) -> Examinee:
    loaded = load_model(path)
    return Examinee(Scorer(loaded.model, 4), loaded.tokenizer)


def result(path: Path, flag: str, file: str, **asked: object) -> dict[str, object]:
    one = PerplexityOf(flag, file, **asked)  # type: ignore[arg-type]
    held = examinee(path)
    one.look(held.model.context.model, held.tokenizer)
    return dict(one.run(held).values)


def test_a_text_and_its_token_file_are_the_same(folder: Path, tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "some.txt", load_model(folder).tokenizer
    file.write_bytes(b"\xef\xbb\xbf" + SENTENCE.encode())
    ids = tokenizer.encode(SENTENCE)
    prefix = write_pair(tmp_path / "some", [ids])
    text, pair = result(folder, "--text", str(file)), result(folder, "--tokens", f"{prefix}.bin")
    names = [name for name in text if name != "file"]
    assert [text[n] for n in names] == [pair[n] for n in names] and text["size"] == len(SENTENCE)
    ended = result(folder, "--tokens", write_pair(tmp_path / "ended", [[*ids, tokenizer.eod]]))
    # an end of a document is a token to score and no byte of the text
    assert (ended["tokens"], ended["size"]) == (len(ids) + 1, len(SENTENCE))
    bare = result(folder, "--tokens", prefix, first="none")
    assert bare["tokens"] == len(ids) - 1
    assert result(folder, "--tokens", prefix, first="261")["nats"] == pair["nats"]
    assert result(folder, "--tokens", prefix, first="5")["nats"] != pair["nats"]


def test_documents_do_not_see_one_another(folder: Path, tmp_path: Path) -> None:
    documents = [[3, 1, 4, 1, 5], [], [9, 2, 6], [5, 3, 5, 8, 9, 7]]
    together = result(folder, "--tokens", write_pair(tmp_path / "all", documents))
    apart = [
        result(folder, "--tokens", write_pair(tmp_path / f"{n}", [one]))["nats"]
        for n, one in enumerate(documents)
        if one
    ]
    assert together["nats"] == pytest.approx(sum(apart), rel=1e-6)  # type: ignore[arg-type]
    assert (together["documents"], together["tokens"]) == (3, 14)
    dataset = IndexedDataset(tmp_path / "all")
    assert (num_scored(dataset, 261), num_scored(dataset, None)) == (14, 11)


def test_bits_per_byte_do_not_depend_on_how_a_text_is_cut(tmp_path: Path) -> None:
    """A coin's bytes by bytes, and by pairs of bytes: one bit each, whatever the perplexity."""
    transformers, found = needs("transformers"), []
    for name, merges in (("bytes", []), ("pairs", ["a a", "a b", "b a", "b b"])):
        path = tmp_path / name
        path.mkdir()
        pairs = [pair.replace(" ", "") for pair in merges]
        words = [*byte_characters(), *pairs, GPT2_EOD]
        (path / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
        (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        config = transformers.GPT2Config(
            vocab_size=len(words), n_positions=8, n_embd=4, n_layer=1, n_head=1,
            bos_token_id=len(words) - 1, eos_token_id=len(words) - 1,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
        likely = [word in (pairs or ["a", "b"]) for word in words]
        with torch.no_grad():  # every position says the same: a table's first column
            model.transformer.ln_f.weight.zero_()
            model.transformer.ln_f.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
            model.transformer.wte.weight[:, 0] = torch.tensor(
                [0.0 if one else -40.0 for one in likely]
            )
        model.save_pretrained(path)
        file = path / "coins.txt"
        file.write_text("ab" * 8)
        found.append(result(path, "--text", str(file)))
    one, two = found
    assert (one["tokens"], two["tokens"]) == (16, 8)
    assert (one["perplexity"], two["perplexity"]) == (pytest.approx(2.0), pytest.approx(4.0))
    assert one["bits_per_byte"] == two["bits_per_byte"] == pytest.approx(1.0)


def test_what_cannot_be_measured_is_refused(folder: Path, tmp_path: Path) -> None:
    for asked, word in (
        ((0, None), "--window 0 must be at least 1"),
        ((25, None), "at most the model's 24 positions"),
        ((8, 9), "--stride 9 must be from 1 to --window 8"),
        ((8, 0), "--stride 0"),
    ):
        with pytest.raises(ConfigError, match=word):
            choose_window(*asked, positions=24, limited=True)
    assert choose_window(None, None, positions=24, limited=True) == (24, 12)
    assert choose_window(99, None, positions=24, limited=False) == (99, 49)
    with pytest.raises(ConfigError, match="--first-token 300 must be eod, none, or an id"):
        result(folder, "--tokens", write_pair(tmp_path / "a", [[1, 2]]), first="300")
    for documents in ([], [[]]):
        with pytest.raises(DataError, match="holds no token to score"):
            result(folder, "--tokens", write_pair(tmp_path / "none", documents))
    dataset = IndexedDataset(write_pair(tmp_path / "b", [[1], [2, 262, 3]]))
    with pytest.raises(DataError, match="b.bin: id 262 in sequence 1 .* has rows for 262"):
        list(pair_documents(dataset, load_model(folder).tokenizer, None, rows=262))
    with pytest.raises(NumericsError, match="some: the log probability"):
        model = load_model(folder).model
        with torch.no_grad():
            model.final_norm.weight.fill_(float("inf"))
        given = [Document(np.array([1, 2, 3]), None)]
        measure_perplexity(Scorer(model), "some", given, window=4, stride=4)
