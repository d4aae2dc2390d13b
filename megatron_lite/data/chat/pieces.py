"""What a template wrote, parted into special tokens and texts; and the characters that help with it.

A guard parts the special tokens that a message spells, so that what is found is the template's own.
Two marks say where a generation block begins and ends; they part no text, which becomes tokens as if
they were not there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeAlias

from megatron_lite.config.errors import DataError

_GUARDS = [chr(n) for n in range(0xFDD0, 0xFDF0)]
"""Noncharacters: no text has a reason to hold one."""


Rendered: TypeAlias = "str | int"
"""A text, or the id of a special token."""


class TextPlace(NamedTuple):
    """Between two characters: a piece of a rendering, and how many of its characters are before."""

    piece: int
    characters: int


class GenerationBlock(NamedTuple):
    """What stands between two places."""

    begin: TextPlace
    end: TextPlace


class Rendering(NamedTuple):
    """Special tokens as ids, and the texts between them, none empty; blocks: None of a template without."""

    pieces: list[Rendered]
    blocks: list[GenerationBlock] | None = None


class TextGuards(NamedTuple):
    """Characters that none of the texts holds."""

    inside: str
    begin: str
    end: str

    @classmethod
    def beside(cls, *texts: str) -> TextGuards:
        """Three that these do not hold."""
        free = [guard for guard in _GUARDS if not any(guard in text for text in texts)]
        if len(free) < len(cls._fields):
            raise DataError(
                "the conversation holds nearly every noncharacter from U+FDD0 to U+FDEF: leave "
                f"{len(cls._fields)} out"
            )
        return cls(*free[: len(cls._fields)])

    def around(self, content: str, special: Collection[str]) -> str:
        """The content, in which no special token stands, nor with what a template puts around it."""
        guard = self.inside
        for token in sorted(special, key=len, reverse=True):
            content = content.replace(token, token[0] + guard + token[1:])
        body = content.strip()
        if not body:
            return content
        front, behind = content[: content.index(body)], content[content.index(body) + len(body) :]
        within = any(body in token for token in special)
        opens = within or any(body.startswith(t[n:]) for t in special for n in range(1, len(t)))
        closes = any(body.endswith(t[:n]) for t in special for n in range(1, len(t)))
        return f"{front}{guard if opens else ''}{body}{guard if closes else ''}{behind}"

    def parted(self, text: str, special: Mapping[str, int], where: str) -> Rendering:
        """The pieces of a text with guards and marks, and what the marks enclose; DataError names `where`."""
        longest_first = [re.escape(token) for token in sorted(special, key=len, reverse=True)]
        pieces: list[Rendered] = []
        places: dict[str, list[TextPlace]] = {self.begin: [], self.end: []}
        for part in re.split(f"({'|'.join([*longest_first, self.begin, self.end])})", text):
            last = pieces[-1] if pieces else 0
            if part in places:
                text_before = len(last) if isinstance(last, str) else 0
                places[part].append(TextPlace(len(pieces) - (text_before > 0), text_before))
            elif part in special:
                pieces.append(special[part])
            elif written := part.replace(self.inside, ""):
                if isinstance(last, str):
                    pieces[-1] = last + written
                else:
                    pieces.append(written)
        begins, ends = places[self.begin], places[self.end]
        if len(begins) != len(ends) or any(a > b for a, b in zip(begins, ends, strict=True)):
            raise DataError(
                f"{where}: this chat template writes a part of what stands in {{% generation %}}, so that "
                "nothing says what is learned - let it write the block as it is"
            )
        return Rendering(
            pieces, [GenerationBlock(*both) for both in zip(begins, ends, strict=True)]
        )
