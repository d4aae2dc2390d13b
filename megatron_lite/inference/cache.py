"""Keys and values of every layer, for rows of many lengths in one batch.

    whole text        token i of a row lies in slot i, its key turned by its position
    start + recent    the first `start` tokens keep their slots, the others share a ring behind them:
                      S S S | 7 8 5 6      keys lie unturned, each is turned by its place among those kept

A forward begins with enter(): it says where the new tokens stand, and the layers find what they see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from megatron_lite.layers.contexts import ForwardContext


@dataclass(slots=True)
class KeyValueCache:
    """Rows of up to `capacity` tokens; preallocated when a layer first comes.

    start: tokens that stay for ever where text may be endless (arXiv:2309.17453); None: nothing is
    ever left out, and a row ends with its capacity.  lengths: tokens that each row has seen;
    wholes: that it will have seen in the end, its capacity where nobody says, by which positions are
    scaled from the first token on (--rope-scaling-type).
    """

    rows: int
    capacity: int
    start: int | None = None
    device: torch.device = torch.device("cpu")
    lengths: list[int] = field(default_factory=list)
    wholes: list[int] = field(default_factory=list)
    _keys: dict[int, Tensor] = field(default_factory=dict)
    _values: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lengths = self.lengths or [0] * self.rows
        self.wholes = self.wholes or [self.capacity] * self.rows
        assert self.start is None or 0 <= self.start < self.capacity, (self.start, self.capacity)

    def room(self, row: int) -> int:
        """Tokens that the row can take in one forward: 0 where it is full, 1 where the ring turns."""
        left = self.capacity - self.lengths[row]
        return left if left > 0 else int(self.start is not None)

    def free(self, row: int, whole: int | None = None) -> None:
        """Another text begins in this row, which will have so many tokens."""
        self.lengths[row] = 0
        # no position lies behind the capacity, however long a text with a ring becomes
        self.wholes[row] = min(whole or self.capacity, self.capacity)

    def rewind(self, row: int, tokens: int, whole: int | None = None) -> None:
        """Another text continues in this row behind the first `tokens` of those it has; see free()."""
        had = self.lengths[row]
        assert tokens in (0, had) or tokens < had <= self.capacity, (tokens, had, self.capacity)
        self.free(row, whole)
        self.lengths[row] = tokens

    def grow(self, capacity: int) -> None:
        """Rows of more tokens, in which what is held stays; not where text is endless."""
        assert self.start is None and capacity >= self.capacity, (self.start, capacity)
        for buffers in (self._keys, self._values):
            for layer, held in buffers.items():
                # zeros, as in store()
                larger = held.new_zeros(*held.shape[:2], capacity + 1, held.shape[3])
                larger[:, :, : self.capacity] = held[:, :, : self.capacity]
                buffers[layer] = larger
        self.capacity = capacity

    @property
    def is_allocated(self) -> bool:
        """Whether a layer has come."""
        return bool(self._keys)

    def enter(
        self, counts: Sequence[int], length: int | None = None, rows: range | None = None
    ) -> CacheEntry:
        """The next forward brings so many tokens of each of these rows, of all by default, padded to a
        length, or to the most of them."""
        rows = range(self.rows) if rows is None else rows
        pairs = list(zip(rows, counts, strict=True))
        assert all(n <= self.room(r) for r, n in pairs), (pairs, self.lengths)
        before = tuple(self.lengths[row] for row in rows)
        self.advance(counts, rows)
        return CacheEntry(self, rows, before, tuple(counts), length or max(counts))

    def advance(self, counts: Sequence[int], rows: range | None = None) -> None:
        """So many tokens of each of these rows have come in."""
        for row, count in zip(range(self.rows) if rows is None else rows, counts, strict=True):
            self.lengths[row] += count

    def store(
        self, layer: int, k: Tensor, v: Tensor, slots: Tensor | slice, rows: range | None = None
    ) -> None:
        """k, v: [b, m, new, d] of these rows into slots int64 [b, new], or the same stretch of each."""
        if layer not in self._keys:
            # one slot more takes what is padding; zeros: a weight of 0 times no number is no number
            shape = (self.rows, k.shape[1], self.capacity + 1, k.shape[3])
            self._keys[layer], self._values[layer] = k.new_zeros(shape), v.new_zeros(shape)
        for whole, new in ((self._keys[layer], k), (self._values[layer], v)):
            held = whole if rows is None else whole[rows.start : rows.stop]
            if isinstance(slots, slice):
                held[:, :, slots] = new
            else:
                place = slots[:, None, :, None].expand_as(new)
                held.scatter_(2, place, new)

    def held(self, layer: int, slots: int, rows: range | None = None) -> tuple[Tensor, Tensor]:
        """The first slots of these rows, [b, m, slots, d]."""
        here = slice(None) if rows is None else slice(rows.start, rows.stop)
        return self._keys[layer][here, :, :slots], self._values[layer][here, :, :slots]


class CacheEntry:
    """One forward of neighbouring rows of a cache: where the new tokens stand and what they see.

    positions: int64 [s] where all rows stand alike, else [s, b].
    """

    def __init__(
        self, cache: KeyValueCache, rows: range, before: tuple[int, ...], counts: tuple[int, ...],
        length: int,
    ) -> None:  # fmt: skip
        self._rows, self._part = rows, None if len(rows) == cache.rows else rows
        self._cache, self._before, self._counts, self._length = cache, before, counts, length
        self.unturned = cache.start is not None
        self._after = [n + c for n, c in zip(before, counts, strict=True)]
        self._slots_seen = max(min(max(self._after), cache.capacity), 1)
        self._turns = max(self._after) > cache.capacity  # a ring, whose places are not in order
        self._alike = len(set(before)) == 1 and set(counts) == {length} and not self._turns
        if self._alike:
            self.positions = torch.arange(before[0], self._after[0], device=cache.device)
        else:
            self.positions = self._numbers(lambda n: min(n, cache.capacity - 1), padding=0).t()

    def _numbers(self, of: Callable[[int], int], *, padding: int) -> Tensor:
        """int64 [b, s]: a number of each new token, which is told how many came before it."""
        rows = [
            [of(before + i) for i in range(count)] + [padding] * (self._length - count)
            for before, count in zip(self._before, self._counts, strict=True)
        ]
        return torch.tensor(rows, device=self._cache.device)

    @property
    def context(self) -> ForwardContext:
        """What the layers are called with."""
        samples = torch.zeros(len(self._rows), dtype=torch.int64, device=self._cache.device)
        wholes = tuple(self._cache.wholes[row] for row in self._rows)
        return ForwardContext(samples=samples, index=self.positions, cache=self, length=wholes)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [b, m, s, d] of the new tokens -> all that is held, [b, m, t, d]."""
        if self._alike:
            stretch = slice(self._before[0], self._after[0])
            self._cache.store(layer, k, v, stretch, self._part)
        else:
            self._cache.store(layer, k, v, self._slots, self._part)
        return self._cache.held(layer, self._slots_seen, self._part)

    @cached_property
    def _slots(self) -> Tensor:
        """int64 [b, s]: where the new tokens lie, the same in all layers; padding lies behind all."""
        return self._numbers(self._slot, padding=self._cache.capacity)

    def _slot(self, token: int) -> int:
        capacity, start = self._cache.capacity, self._cache.start or 0
        return token if token < capacity else start + (token - start) % (capacity - start)

    def key_positions(self) -> Tensor:
        """int64 [t] where all rows stand alike, else [t, b]: the place of each slot among those kept."""
        slots = torch.arange(self._slots_seen, device=self._cache.device)
        if self._alike or not self._turns:
            return slots
        after = torch.tensor(self._after, device=slots.device)
        return places_kept(slots, after, self._cache)

    def seen(self, window: int | None) -> Tensor | None:
        """bool [b, 1, s, t]: which slots a new token sees; None: those up to its own, in order."""
        return None if self._alike else seen_slots(self.key_positions(), self.positions, window)


def places_kept(slots: Tensor, after: Tensor, cache: KeyValueCache) -> Tensor:
    """slots: int64 [t], after: tokens of each row, int64 [b] -> int64 [t, b], the place of each slot
    among those kept."""
    start, ring = cache.start or 0, cache.capacity - (cache.start or 0)
    # the oldest of the ring, which has the first place, lies behind the newest
    turned = (after - cache.capacity).clamp(min=0) % ring
    places = start + (slots[:, None] - start - turned) % ring
    return torch.where(slots[:, None] < start, slots[:, None], places)


def seen_slots(keys: Tensor, queries: Tensor, window: int | None) -> Tensor:
    """keys: places of what is held, int64 [t] or [t, b]; queries: int64 [s, b] -> bool [b, 1, s, t]."""
    keys = (keys[:, None] if keys.dim() == 1 else keys).t()[:, None, None, :]  # [1 or b, 1, 1, t]
    queries = queries.t()[:, None, :, None]  # [b, 1, s, 1]
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)
