"""Tokens that come one by one give the text that they give together."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.inference.texts import TextStream
from tests.support.tokenizers import gpt2, hugging_face, llama_2, sentencepiece_as_gpt


def stream(tokenizer, ids, prompt=(), stops=()):
    """The pieces, and the stream that they came from."""
    made = TextStream(tokenizer, prompt, stops)
    return [*(made.add(token) for token in ids), made.finish()], made


@pytest.mark.parametrize("kind", [gpt2, hugging_face, sentencepiece_as_gpt, llama_2])
def test_the_pieces_are_the_whole(tmp_path: Path, kind) -> None:
    tokenizer = build_tokenizer(kind(tmp_path))
    draw = random.Random(4)
    for length in (1, 2, 40):
        prompt = tokenizer.encode("the other thing")
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(length)]
        if tokenizer.vocab_size > 250:  # bytes, most of which are no characters in such an order
            ids = tokenizer.encode("naïve — 你好 the 😀 👩‍👩‍👧 end")
        pieces, made = stream(tokenizer, ids, prompt)
        whole = tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]
        assert "".join(pieces) == made.text == whole


def test_half_a_character_waits_for_its_other_half(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(gpt2(tmp_path))
    pieces, _ = stream(tokenizer, tokenizer.encode("a😀b"))
    assert pieces == ["a", "", "", "", "😀", "b", ""]
    broken, _ = stream(tokenizer, tokenizer.encode("a😀")[:-1])
    assert broken == ["a", "", "", "", "\ufffd"]


def test_a_stop_text_ends_it_and_its_beginning_is_kept_back(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(gpt2(tmp_path))
    pieces, made = stream(tokenizer, tokenizer.encode("x EN y END z"), stops=["END", "OVER"])
    assert made.text == "".join(pieces) == "x EN y " and made.found
    assert pieces[:6] == ["x", " ", "", "", "EN ", "y"]
    pieces, made = stream(tokenizer, tokenizer.encode("x EN"), stops=["END"])
    assert made.text == "".join(pieces) == "x EN" and not made.found
    # the one that comes first counts
    assert stream(tokenizer, tokenizer.encode("abcd"), stops=["cd", "bc"])[1].text == "a"
