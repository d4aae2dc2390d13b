"""Interpolated Kneser-Ney models of n tokens: what counting alone achieves on a stream.

Discounts are n1 / (n1 + 2 n2) of each order's counts; lower orders count in how many different
contexts a token stands, and the lowest rests on the uniform distribution (Ney, Essen, Kneser 1994;
Chen, Goodman 1999, section 2.7).  A token near the beginning is predicted from what stands there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Stream = npt.NDArray[np.int64]
"""Tokens one after the other."""

NO_SINGLES = 0.5  # the discount where nothing was counted once


@dataclass(frozen=True, slots=True)
class NgramCounts:
    """How often every n-gram was seen; a key is the number whose digits in base V are its tokens."""

    keys: npt.NDArray[np.int64]
    """Sorted, each once."""
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, keys: npt.NDArray[np.int64]) -> NgramCounts:
        """Of n-grams in any order."""
        return cls(*np.unique(keys, return_counts=True))

    def __add__(self, other: NgramCounts) -> NgramCounts:
        keys, place = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, place, np.concatenate([self.counts, other.counts]))
        return NgramCounts(keys, counts)

    def contexts(self, base: int) -> NgramCounts:
        """Of the n-grams without their first token: the number of first tokens; keys below base."""
        return NgramCounts.of(self.keys % base)

    def discount(self) -> float:
        """What every count gives to the lower order."""
        once, twice = int((self.counts == 1).sum()), int((self.counts == 2).sum())
        return once / (once + 2 * twice) if once else NO_SINGLES


def keys_of(stream: Stream, order: int, vocab_size: int) -> npt.NDArray[np.int64]:
    """The key of the n-gram that ends at each token from number `order - 1` on."""
    keys = np.zeros(max(len(stream) - order + 1, 0), np.int64)
    for place in range(order):
        keys = keys * vocab_size + stream[place : place + len(keys)]
    return keys


def count(streams: Iterable[Iterator[Stream]], order: int, vocab_size: int) -> NgramCounts:
    """N-grams of that order in streams that come in pieces, across pieces but not across streams."""
    found, waiting = NgramCounts.of(np.zeros(0, np.int64)), NgramCounts.of(np.zeros(0, np.int64))
    for pieces in streams:
        before = np.zeros(0, np.int64)
        for piece in pieces:
            joined = np.concatenate([before, piece])
            waiting = waiting + NgramCounts.of(keys_of(joined, order, vocab_size))
            before = joined[len(joined) - min(order - 1, len(joined)) :]
            if len(waiting.keys) > len(found.keys) // 4:
                found, waiting = found + waiting, NgramCounts.of(np.zeros(0, np.int64))
    return found + waiting


def interpolated(
    table: NgramCounts, keys: Stream, lower: npt.NDArray[np.float64], base: int
) -> Stream:
    """Probability of every key's last token after the others; `lower` is it by the lower order."""
    discount = table.discount()
    context, first = np.unique(table.keys // base, return_index=True)
    total = np.add.reduceat(table.counts, first)
    kinds = np.diff(np.append(first, len(table.keys)))
    place = np.minimum(np.searchsorted(table.keys, keys), len(table.keys) - 1)
    seen = np.where(table.keys[place] == keys, table.counts[place] - discount, 0.0)
    row = np.minimum(np.searchsorted(context, keys // base), len(context) - 1)
    mixed = (np.maximum(seen, 0.0) + discount * kinds[row] * lower) / total[row]
    return np.where(context[row] == keys // base, mixed, lower)


class NgramModel:
    """A model of `order` tokens, from the counts of every order up to it."""

    def __init__(self, tables: list[NgramCounts], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.levels = [
            *(table.contexts(vocab_size**n) for n, table in enumerate(tables[1:], start=1)),
            tables[-1],
        ]

    def probabilities(self, stream: Stream) -> npt.NDArray[np.float64]:
        """Of every token of the stream after those before it."""
        found = np.full(len(stream), 1.0 / self.vocab_size)
        for order, table in enumerate(self.levels, start=1):
            keys = keys_of(stream, order, self.vocab_size)
            if len(table.keys) and len(keys):
                found[order - 1 :] = interpolated(table, keys, found[order - 1 :], self.vocab_size)
        return found
