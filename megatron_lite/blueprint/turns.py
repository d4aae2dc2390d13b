"""When a tensor is trained: from an update of the run on, or in intervals that are drawn (LISA)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol

FOR_GOOD = 1 << 62
"""The first update of what is frozen for good."""


class Turns(Protocol):
    """The updates of a run that change a tensor; they follow from their numbers, on every rank alike."""

    def trains(self, steps: int) -> bool:
        """Whether the update after so many changes it, which needs a gradient for it."""
        ...

    def begun(self, steps: int) -> int | None:
        """After how many updates those in a row began whose states are kept then; None: none are.

        Without states there is no memory for its gradient, either.
        """
        ...

    def changes(self, steps: int) -> bool:
        """Whether the next update after so many may be another matter than the last."""
        ...


@dataclass(frozen=True, slots=True)
class From:
    """From the update after so many on; frozen until then, with the states of the start."""

    first: int = 0

    def trains(self, steps: int) -> bool:
        """See Turns."""
        return steps >= self.first

    def begun(self, steps: int) -> int | None:
        """See Turns."""
        return self.first

    def changes(self, steps: int) -> bool:
        """See Turns."""
        return steps == self.first


ALWAYS, NEVER = From(), From(FOR_GOOD)


@dataclass(frozen=True, slots=True)
class BlockDraw:
    """`drawn` of the `blocks` train in each interval of so many updates (LISA, arXiv:2403.17919, algorithm 1).

    Which ones is a function of the seed and the interval's number: the same on every stage and after
    a resume, whatever was drawn before.
    """

    blocks: int
    drawn: int
    interval: int
    seed: int

    @property
    def share(self) -> float:
        """Of the updates that change a block, on average."""
        return self.drawn / self.blocks

    def at(self, steps: int) -> frozenset[int]:
        """The blocks that the update after so many changes."""
        return _drawn(self, steps // self.interval)


@lru_cache(maxsize=1 << 10)
def _drawn(draw: BlockDraw, interval: int) -> frozenset[int]:
    def ticket(block: int) -> bytes:
        return blake2b(f"LISA {draw.seed} {interval} {block}".encode()).digest()

    return frozenset(sorted(range(draw.blocks), key=ticket)[: draw.drawn])


@dataclass(frozen=True, slots=True)
class OfBlock:
    """In the intervals that draw its block; its states begin anew with each row of them."""

    draw: BlockDraw
    block: int

    def trains(self, steps: int) -> bool:
        """See Turns."""
        return self.block in self.draw.at(steps)

    def begun(self, steps: int) -> int | None:
        """See Turns; a block that is drawn again at once keeps its states."""
        if not self.trains(steps):
            return None
        first = steps - steps % self.draw.interval
        while first and self.trains(first - 1):
            first -= self.draw.interval
        return first

    def changes(self, steps: int) -> bool:
        """See Turns."""
        return steps % self.draw.interval == 0
