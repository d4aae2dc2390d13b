"""A command line as its flags, each with the words that follow it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Use:
    """One flag as it stands on the command line."""

    written: str
    name: str
    values: tuple[str, ...]


def _is_flag(word: str) -> bool:
    """Whether a word starts a flag; negative numbers, -inf and -nan are values."""
    return bool(re.match(r"--|-(?!inf|nan)[a-zA-Z]", word, re.IGNORECASE))


def dashed(flag: str) -> str:
    """A flag as settings have it: Megatron's scripts write some with underscores."""
    return flag.replace("_", "-")


def uses(argv: Sequence[str], problems: list[str]) -> Iterator[Use]:
    """The flags of a command line with the words that follow each."""
    words = list(argv)
    at = 0
    while at < len(words):
        if not _is_flag(words[at]):
            problems.append(f"{words[at]!r} belongs to no flag; arguments look like --lr 1e-4")
            at += 1
            continue
        written, equals, inline = words[at].partition("=")
        values = [inline] if equals else []
        at += 1
        while at < len(words) and not _is_flag(words[at]):
            values.append(words[at])
            at += 1
        yield Use(written, dashed(written), tuple(values))


def no_values(use: Use, hint: str = "") -> None:
    """ValueError where a flag that takes none has some."""
    if use.values:
        raise ValueError(f"takes no value, got {' '.join(map(repr, use.values))}{hint}")
