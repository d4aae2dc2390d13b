"""Greedy decoding with a cache over tp and pp: in every family token for token as without one.

The prompts are unequal, go in by chunks of three tokens, and share two rows: the third takes the
place of the one that ends first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_lite.blueprint.grid import RankGrid
from megatron_lite.config.errors import ConfigError
from megatron_lite.inference.generate import Generation, TextRequest, Token
from megatron_lite.inference.model import build_model, find_model, require_layout
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context import ParallelContext
from tests.support.decoding import likeliest, whole_forward
from tests.support.extras import needs
from tests.support.families import TINY, tiny
from tests.support.huggingface import gpt2
from tests.support.spawn import spawn

needs("transformers")

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79], [97], [9, 32, 38, 46, 26]]
NEW = [5, 12, 9]
FAMILIES = ("gpt2", *TINY)
Texts = list[list[int]]


def loaded(folder: Path, ctx: ParallelContext | None = None) -> Decoder:
    ctx = ctx or ParallelContext.serial()
    return build_model(find_model(folder, ctx), ctx)


def next_token(model: Decoder, seen: Sequence[int], text: Sequence[int], whole: int) -> int:
    return int(likeliest(whole_forward(model, seen, whole)[None], text))


def uncached(model: Decoder) -> Texts:
    """What follows each prompt."""
    texts = [list(prompt) for prompt in PROMPTS]
    for text, new in zip(texts, NEW, strict=True):
        whole = len(text) + new
        for _ in range(new):
            text.append(next_token(model, text, text, whole))
    return [text[len(prompt) :] for text, prompt in zip(texts, PROMPTS, strict=True)]


def cached(model: Decoder, **how: int) -> Texts:
    """The same by the cache."""
    asked = [TextRequest(p, n, likeliest) for p, n in zip(PROMPTS, NEW, strict=True)]
    found: Texts = [[] for _ in asked]
    ends = {}
    for token in Generation(model, **{"rows": 2, "chunk": 3, **how}).run(asked):
        assert token.request not in ends, "an ended request continues"
        found[token.request].append(token.id)
        if token.end:
            ends[token.request] = token.end
    assert ends == dict.fromkeys(range(3), "length")
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family with sizes that two ranks can share."""
    made = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    gpt2(n_head=4, vocab_size=263).save_pretrained(made["gpt2"])
    for name in TINY:
        tiny(name, intermediate_size=54).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, Texts]:
    found = {name: uncached(loaded(folder)) for name, folder in folders.items()}
    for texts in found.values():
        assert len({token for text in texts for token in text}) > 8  # not one again and again
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_with_a_cache_the_same_tokens_follow(folders, expected, name) -> None:
    model = loaded(folders[name])
    assert cached(model) == expected[name]
    assert cached(model, rows=3, chunk=100) == cached(model, rows=1) == expected[name]


def decoded(rank: int, ranks: int, folders: dict[str, Path], tp: int) -> dict[str, Texts]:
    ctx = ParallelContext.from_grid(RankGrid(tp=tp, pp=ranks // tp), rank, torch.device("cpu"))
    return {name: cached(loaded(folder, ctx)) for name, folder in folders.items()}


def test_over_pp_the_same_tokens_follow(folders, expected) -> None:
    some = ["gpt2", "llama-tied"]
    found = spawn(decoded, 2, {name: folders[name] for name in some}, 1)
    assert found == [{name: expected[name] for name in some}] * 2


@pytest.mark.parametrize(
    ("ranks", "tp"),
    [
        pytest.param(2, 1, id="pp2", marks=pytest.mark.ci),
        pytest.param(2, 2, id="tp2", marks=pytest.mark.ci),
        pytest.param(4, 2, id="tp2 x pp2", marks=pytest.mark.ci),
    ],
)
def test_over_tp_and_pp_the_same_tokens_follow_on_every_rank(folders, expected, ranks, tp) -> None:
    assert spawn(decoded, ranks, folders, tp) == [expected] * ranks


# -- start and recent tokens --------------------------------------------------------------------


def endless(model: Decoder, prompt: Sequence[int], new: int, **how: int) -> list[Token]:
    return list(Generation(model, **how).run([TextRequest(prompt, new, likeliest)]))


ROTARY = [name for name in TINY if name != "mistral"]


@pytest.mark.parametrize("name", ROTARY)
def test_a_window_that_holds_the_text_changes_nothing(folders, expected, name) -> None:
    assert cached(loaded(folders[name]), keep=17) == expected[name]


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gpt_neox"])
def test_beyond_it_each_token_sees_the_first_and_the_latest_ones(tmp_path, name) -> None:
    """Of one layer keys are functions of their tokens alone: the text without its middle says the same."""
    tiny(name, num_hidden_layers=1).save_pretrained(tmp_path)
    model = loaded(tmp_path)
    keep, start, prompt = 9, 3, PROMPTS[0]
    found = [
        token.id for token in endless(model, prompt, 8 * keep, keep=keep, start=start, chunk=5)
    ]
    text = list(prompt)
    while len(text) < len(prompt) + 8 * keep:
        seen = text if len(text) <= keep else text[:start] + text[start - keep :]
        text.append(next_token(model, seen, text, keep))
    assert found == text[len(prompt) :]
    assert len(set(found)) > 8


def test_rows_reach_their_window_at_different_times(tmp_path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    model = loaded(tmp_path)
    how = {"keep": 8, "start": 2, "chunk": 5}
    alone = [[t.id for t in endless(model, prompt, 30, **how)] for prompt in PROMPTS]
    together: Texts = [[], [], []]
    for token in Generation(model, rows=3, **how).run(
        [TextRequest(p, 30, likeliest) for p in PROMPTS]
    ):
        together[token.request].append(token.id)
    assert together == alone


def test_a_layout_that_does_not_fit_says_so(folders) -> None:
    config = find_model(folders["llama"], ParallelContext.serial()).config
    with pytest.raises(ConfigError, match="(?s)4 problems.*heads 6 .*heads 2 .*54 .*has 2 layers"):
        require_layout(config, 5, 3)
