"""Greedy decoding with a cache over tp and pp: in every family token for token as without one.

The prompts are unequal, go in by chunks of three tokens, and share two rows: the third takes the
place of the one that ends first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_lite.blueprint.grid import RankGrid
from megatron_lite.config.errors import ConfigError
from megatron_lite.inference.generate import Generation, TextRequest, Token
from megatron_lite.inference.model import build_model, find_model, require_layout
from megatron_lite.inference.stages import parted
from megatron_lite.layers.contexts import StageContext
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context import ParallelContext
from tests.inference.continuing import (
    FAMILIES,
    PROMPTS,
    ROTARY,
    Texts,
    cached,
    loaded,
    next_token,
    uncached,
    write_family,
)
from tests.support.decoding import likeliest
from tests.support.extras import needs
from tests.support.families import tiny
from tests.support.spawn import spawn

needs("transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family with sizes that two ranks can share."""
    return {name: write_family(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


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


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "mistral", "gpt_neox-in-turn"])
def test_long_prompts_go_in_by_themselves(folders, name) -> None:
    """Beside rows that bring a token, and beside short prompts: what is padded would be most of it."""
    model = loaded(folders[name])
    prompts, new = [[97], PROMPTS[0], [9], [7, 8], PROMPTS[0][::-1]], [11, 4, 12, 9, 3]
    expected = uncached(model, prompts, new)
    keep = {} if name in ("gpt2", "mistral") else {"keep": 17}
    assert cached(model, prompts, new, rows=4, chunk=100) == expected
    assert cached(model, prompts, new, rows=4, chunk=100, **keep) == expected


def test_what_is_padded_is_at_most_half() -> None:
    for counts, alone, together in (
        ([5, 4, 3], [], [5, 4, 3]), ([1, 1, 0, 1], [], [1, 1, 0, 1]), ([0, 0, 0, 1], [], [0, 0, 0, 1]),
        ([1, 9, 1, 1], [1], [1, 0, 1, 1]), ([0, 9, 0, 7, 1, 0], [1, 3], [0, 0, 0, 0, 1, 0]),
        ([0, 0, 9], [2], None), ([9], [], [9]),
    ):  # fmt: skip
        new = [[3] * count for count in counts]
        parts = parted(new)
        assert [list(rows) for _, rows in parts[: len(alone)]] == [[row] for row in alone]
        rest = [list(map(len, tokens)) for tokens, _ in parts[len(alone) :]]
        assert rest == ([] if together is None else [together])


# -- long texts, and every way of turning ---------------------------------------------------------

TURNINGS: dict[str, dict[str, object]] = {
    "none": {}, "linear": {"rope_scaling_factor": 2.5}, "ntk": {"rope_scaling_factor": 3.0},
    "dynamic": {"rope_scaling_factor": 2.0, "rope_original_length": 20},
    "yarn": {"rope_scaling_factor": 4.0, "rope_original_length": 20},
    "llama3": {"rope_scaling_factor": 4.0, "rope_original_length": 20},
    "clex": {"rope_scaling_factor": 4.0, "rope_original_length": 20},
    "longrope": {"rope_scaling_factor": 4.0, "rope_original_length": 20},
}  # fmt: skip
LONG = [[3, 1, 4, 1, 5, 9, 2], [97], [9, 32, 38]]
LONG_NEW = [128, 128, 100]


def turned_model(folder: Path, kind: str) -> Decoder:
    """A family's model with random weights, whose positions are turned so."""
    ctx = ParallelContext.serial()
    source = find_model(folder, ctx)
    parameters = TURNINGS[kind]
    if kind == "longrope":
        pairs = source.config.rotated_channels // 2
        listed = [",".join(f"{1 + n * step:.2f}" for n in range(pairs)) for step in (0.1, 0.5)]
        parameters = parameters | {"rope_short_factors": listed[0], "rope_long_factors": listed[1]}
    config = dataclasses.replace(
        source.config, rope_scaling_type=kind, max_position_embeddings=256, **parameters
    )
    vocabulary = config.vocab_size
    context = StageContext(config, ctx, padded_vocab_size=vocabulary, vocab_size=vocabulary)
    model = Decoder(context, range(config.num_layers), has_embedding=True, has_head=True).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", TURNINGS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox", "qwen2", "qwen3"])
def test_long_texts_of_every_family_and_turning(folders, name, kind) -> None:
    model = turned_model(folders[name], kind)
    expected = uncached(model, LONG, LONG_NEW)
    assert len({token for text in expected for token in text}) > 12
    assert cached(model, LONG, LONG_NEW) == expected


def long_texts(rank: int, ranks: int, folders: dict[str, Path], tp: int) -> dict[str, Texts]:
    ctx = ParallelContext.from_grid(RankGrid(tp=tp, pp=ranks // tp), rank, torch.device("cpu"))
    return {name: cached(loaded(path, ctx), LONG, LONG_NEW) for name, path in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "tp"), [(2, 2), (2, 1), (4, 2)], ids=["tp2", "pp2", "tp2 x pp2"])
def test_long_texts_over_tp_and_pp(folders, ranks, tp) -> None:
    some = {name: folders[name] for name in ("llama-tied", "mistral", "gpt_neox-in-turn", "qwen3")}
    expected = {name: uncached(loaded(path), LONG, LONG_NEW) for name, path in some.items()}
    assert spawn(long_texts, ranks, some, tp) == [expected] * ranks


# -- start and recent tokens --------------------------------------------------------------------


def endless(model: Decoder, prompt: Sequence[int], new: int, **how: int) -> list[Token]:
    return list(Generation(model, **how).run([TextRequest(prompt, new, likeliest)]))


@pytest.mark.parametrize("name", ROTARY)
def test_a_window_that_holds_the_text_changes_nothing(folders, expected, name) -> None:
    assert cached(loaded(folders[name]), keep=17) == expected[name]


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gpt_neox", "gpt_neox by neighbours"])
def test_beyond_it_each_token_sees_the_first_and_the_latest_ones(tmp_path, name) -> None:
    """Of one layer keys are functions of their tokens alone: the text without its middle says the same."""
    kind, _, by_neighbours = name.partition(" by ")
    tiny(kind, num_hidden_layers=1).save_pretrained(tmp_path)
    source = find_model(tmp_path, ParallelContext.serial())
    if by_neighbours:  # no folder says it: the same random numbers are another model
        found = source.found
        turned = dataclasses.replace(found.model, rotary_interleaved=True)
        source = dataclasses.replace(source, found=dataclasses.replace(found, model=turned))
    model = build_model(source, ParallelContext.serial())
    assert model.blocks["0"].attention.core.interleaved == bool(by_neighbours)
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


# -- what an earlier text has left --------------------------------------------------------------


def entered(model: Decoder, prompts: Texts, new: int, **how: int) -> tuple[Texts, list[int]]:
    """What follows prompts that come one after another, and how many tokens of each went in."""
    generation = Generation(model, remember=True, chunk=4, **how)
    found, went = [], []
    for prompt in prompts:
        before = generation.speed.prompt_tokens
        found.append([t.id for t in generation.run([TextRequest(prompt, new, likeliest)])])
        went.append(generation.speed.prompt_tokens - before)
    return found, went


def grown(model: Decoder, new: int) -> Texts:
    """A conversation: each prompt is the text before it, with its answer, and something more."""
    prompts = [PROMPTS[2]]
    for more in ([7, 8], [9, 9, 9]):
        (answer,) = uncached(model, prompts[-1:], [new])
        prompts.append([*prompts[-1], *answer, *more])
    # one that leaves it early, one that is its beginning, and another text
    return [*prompts, [*prompts[1][:8], 77], prompts[0], PROMPTS[0]]


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "mistral", "qwen2"])
def test_a_text_continues_behind_what_is_remembered_of_it(folders, name) -> None:
    model = loaded(folders[name])
    prompts = grown(model, 3)
    expected = uncached(model, prompts, [3] * len(prompts))
    found, went = entered(model, prompts, 3)
    assert found == expected
    # the last token of an answer has not gone in before
    assert went == [5, 3, 4, 1, 1, 12]


def test_positions_that_go_by_the_length_are_made_anew(folders) -> None:
    for name in ("gpt_neox-in-turn", "qwen3"):
        model = loaded(folders[name])
        prompts = grown(model, 3)
        found, went = entered(model, prompts, 3)
        assert found == uncached(model, prompts, [3] * len(prompts))
        assert went == [len(prompt) for prompt in prompts]


def test_a_ring_that_has_turned_continues(folders) -> None:
    """Its text, all of it and more, continues; one that leaves it early begins anew."""
    model, new = loaded(folders["llama-tied"]), 6
    how = {"keep": 9, "start": 2}
    first = PROMPTS[0]
    answer = [t.id for t in endless(model, first, new, **how, chunk=1)]
    prompts = [first, [*first, *answer, 5], [*first, 6]]
    found, went = entered(model, prompts, new, **how)
    alone = [[t.id for t in endless(model, p, new, **how, chunk=1)] for p in prompts]
    assert found == alone
    assert went == [12, 2, 13]


def test_nothing_is_remembered_of_a_run_that_was_broken_off(folders) -> None:
    model = loaded(folders["llama"])
    generation = Generation(model, remember=True)

    def stop(generated: Sequence[int]) -> bool:
        raise KeyboardInterrupt

    asked = TextRequest(PROMPTS[0], 5, likeliest)
    (expected,) = uncached(model, PROMPTS[:1], [5])
    assert [t.id for t in generation.run([asked])] == expected
    with pytest.raises(KeyboardInterrupt):
        list(generation.run([TextRequest(PROMPTS[0], 5, likeliest, until=stop)]))
    before = generation.speed.prompt_tokens
    assert [t.id for t in generation.run([asked])] == expected
    assert generation.speed.prompt_tokens - before == len(PROMPTS[0])
