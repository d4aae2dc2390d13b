"""What a tokenizer does to a text: its pieces, whether they give the text back, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_lite.data.tokenizers.base import Tokenizer


class Piece(NamedTuple):
    """An id in a text; text: None for one that ends within a character, which a later one completes."""

    id: int
    text: str | None


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Piece]:
    """What each id adds to the text; quadratic in their number, for as many as a person reads."""
    complete, done = tokenizer.decode(ids), 0
    found = []
    for count, number in enumerate(ids, start=1):
        so_far = tokenizer.decode(ids[:count])
        if complete.startswith(so_far):
            found.append(Piece(number, so_far[done:]))
            done = len(so_far)
        else:  # U+FFFD stands for the bytes of a character that is not whole yet
            found.append(Piece(number, None))
    return found


def changed_from(text: str, back: str) -> int | None:
    """The character at which two texts begin to differ; None where they are equal."""
    if text == back:
        return None
    pairs = enumerate(zip(text, back, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(text), len(back)))


@dataclass(frozen=True, slots=True)
class Measure:
    """What many texts became."""

    texts: int
    characters: int
    bytes: int
    tokens: int
    unknown: int
    changed: int

    @property
    def lines(self) -> list[str]:
        """For a person."""
        tokens = max(self.tokens, 1)
        return [
            f"characters per token: {self.characters / tokens:.3f} ({self.characters} characters of "
            f"{self.texts} texts, {self.bytes / tokens:.3f} bytes per token)",
            f"unknown tokens: {self.unknown} of {self.tokens} ({self.unknown / tokens:.4%})",
            f"texts that do not come back as they were: {self.changed} of {self.texts}",
        ]


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> Measure:
    """Encode and decode them all."""
    encoded = tokenizer.encode_batch(texts)
    unknown, at, changed = tokenizer.unknown, 0, 0
    for text, length in zip(texts, encoded.lengths.tolist(), strict=True):
        changed += tokenizer.decode(encoded.ids[at : at + length].tolist()) != text
        at += length
    return Measure(
        texts=len(texts),
        characters=sum(map(len, texts)),
        bytes=sum(len(text.encode()) for text in texts),
        tokens=len(encoded.ids),
        unknown=0 if unknown is None else int((encoded.ids == unknown).sum()),
        changed=changed,
    )
