"""Samples share rows: best-fit decreasing, which wastes little and needs no search.

lengths 7 3 6 2 2, rows of 10  ─▶  [7 3] [6 2 2]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Row r holds the samples slots[bounds[r]:bounds[r + 1]], in this order."""

    slots: _Int64
    bounds: _Int64

    def __len__(self) -> int:
        return len(self.bounds) - 1


def rows_alone(count: int) -> PackedRows:
    """Each of so many samples in a row of its own."""
    return PackedRows(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def pack_rows(falling: npt.NDArray[np.integer[Any]], room: int) -> PackedRows:
    """falling: lengths of samples, the longest first -> rows of `room` tokens at most.

    Each sample goes where it leaves the least room (Johnson 1973): at most 11/9 of the fewest rows,
    and one more.  How many rows there are depends on the lengths alone.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    open_rooms = 0  # bit r: a row with room for r more tokens
    for number, length in enumerate(falling.tolist()):
        assert 0 < length <= room, (length, room)
        fitting = open_rooms >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = with_room[left].pop()
            if not with_room[left]:
                open_rooms &= ~(1 << left)
            rows[row].append(number)
        else:
            row, left = len(rows), room
            rows.append([number])
        left -= length
        if left:
            with_room.setdefault(left, []).append(row)
            open_rooms |= 1 << left
    sizes = np.array([len(row) for row in rows], np.int64)
    slots = np.array([number for row in rows for number in row], np.int64)
    return PackedRows(slots, np.concatenate(([0], np.cumsum(sizes, dtype=np.int64))))
