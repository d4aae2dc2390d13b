"""Token ids that come one by one become text: whole characters, up to the first stop text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_lite.data.tokenizers.base import Tokenizer

_UNFINISHED = "\ufffd"
"""What the bytes of a character decode to that has not come whole."""

_LONGEST_CHARACTER = 4
"""Bytes, and so tokens: what stays undecodable longer is broken, not unfinished."""


@dataclass(slots=True)
class TextStream:
    """The text of what follows a prompt.

    stops: texts that end it, and are no part of it; found: one came.  Whatever might be the
    beginning of one is kept back until that is known.
    """

    tokenizer: Tokenizer
    prompt: Sequence[int] = ()
    stops: Sequence[str] = ()
    text: str = ""
    found: bool = False
    _before: list[int] = field(default_factory=list)
    _new: list[int] = field(default_factory=list)
    _held: str = ""

    def __post_init__(self) -> None:
        # what a token says depends on whether it is the first: a few before it are enough
        self._before = list(self.prompt[-_LONGEST_CHARACTER:])

    def add(self, token: int) -> str:
        """The next token; returns the text that it makes certain."""
        self._new.append(token)
        return self._release(self._decoded(whole=False), last=False)

    def finish(self) -> str:
        """No token follows; returns the text that was kept back."""
        return self._release(self._decoded(whole=True), last=True)

    def _decoded(self, *, whole: bool) -> str:
        """The text of new tokens whose characters are there."""
        if not self._new:
            return ""
        before = self.tokenizer.decode(self._before)
        both = self.tokenizer.decode([*self._before, *self._new])
        unfinished = both.endswith(_UNFINISHED) and len(self._new) < _LONGEST_CHARACTER
        if unfinished and not whole:
            return ""
        self._before, self._new = [*self._before, *self._new][-2 * _LONGEST_CHARACTER :], []
        common = len(before) if both.startswith(before) else _common(before, both)
        return both[common:]

    def _release(self, new: str, *, last: bool) -> str:
        if self.found:
            return ""
        self._held += new
        places = [self._held.find(stop) for stop in self.stops if stop in self._held]
        if places:
            self.found = True
            certain = min(places)
        else:
            certain = len(self._held) - (0 if last else self._may_begin_a_stop())
        released, self._held = self._held[:certain], "" if self.found else self._held[certain:]
        self.text += released
        return released

    def _may_begin_a_stop(self) -> int:
        """How many of the last characters held might be the beginning of a stop text."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self.stops):
                return size
        return 0


def _common(one: str, other: str) -> int:
    """Characters with which both begin."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
