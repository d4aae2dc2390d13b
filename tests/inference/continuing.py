"""Models of every family, prompts of unequal lengths, and what follows them with and without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lite.inference.generate import Generation, TextRequest
from megatron_lite.inference.model import build_model, find_model
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context import ParallelContext
from tests.support.decoding import likeliest, whole_forward
from tests.support.families import TINY, tiny
from tests.support.huggingface import gpt2

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79], [97], [9, 32, 38, 46, 26]]
NEW = [5, 12, 9]
FAMILIES = ("gpt2", *TINY)
ROTARY = [name for name in TINY if name != "mistral"]
Texts = list[list[int]]


def write_family(folder: Path, name: str) -> Path:
    """A model with sizes that two ranks can share."""
    made = gpt2(n_head=4, vocab_size=263) if name == "gpt2" else tiny(name, intermediate_size=54)
    made.save_pretrained(folder)
    return folder


def loaded(folder: Path, ctx: ParallelContext | None = None) -> Decoder:
    """This rank's stage of it."""
    ctx = ctx or ParallelContext.serial()
    return build_model(find_model(folder, ctx), ctx)


def next_token(model: Decoder, seen: Sequence[int], text: Sequence[int], whole: int) -> int:
    """What likeliest takes where the model sees these tokens, of a text."""
    return int(likeliest(whole_forward(model, seen, whole)[None], text))


def uncached(model: Decoder, prompts: Texts = PROMPTS, new: Sequence[int] = NEW) -> Texts:
    """What follows each prompt."""
    texts = [list(prompt) for prompt in prompts]
    for text, count in zip(texts, new, strict=True):
        whole = len(text) + count
        for _ in range(count):
            text.append(next_token(model, text, text, whole))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def cached(model: Decoder, prompts: Texts = PROMPTS, new: Sequence[int] = NEW, **how: Any) -> Texts:
    """The same by the cache."""
    asked = [TextRequest(p, n, likeliest) for p, n in zip(prompts, new, strict=True)]
    found: Texts = [[] for _ in asked]
    ends = {}
    for token in Generation(model, **{"rows": 2, "chunk": 3, **how}).run(asked):
        assert token.request not in ends, "an ended request continues"
        assert token.id is not None
        found[token.request].append(token.id)
        if token.end:
            ends[token.request] = token.end
    assert ends == dict.fromkeys(range(len(prompts)), "length")
    return found
