"""A range of a parameter's elements, as a flat partition has it, as boxes of canonical tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_lite.parallel.shard import LocalParameter, ParameterPiece


class Box(NamedTuple):
    """Elements [start, stop) of a flat parameter are rows of a piece, or neighbours in one row of it."""

    piece: ParameterPiece
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    stop: int


def boxes(local: LocalParameter, sizes: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """What elements [start, stop) of a parameter of these sizes are: for each piece at most a row's
    end, whole rows, and a row's beginning.  Rows that pad a vocabulary are none of them.
    """
    width = math.prod(sizes[1:])
    for piece in local.pieces:
        first = max(start, piece.start * width)
        last = min(stop, piece.stop * width)
        for begin, end in _runs(first, last, width):
            yield _box(piece, begin, end, sizes)


def _runs(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Cut a range of elements where whole rows begin and end."""
    if start >= stop:
        return
    up, down = -(-start // width) * width, stop // width * width
    marks = sorted({start, min(max(up, start), stop), max(min(down, stop), start), stop})
    yield from zip(marks, marks[1:], strict=False)


def _box(piece: ParameterPiece, start: int, stop: int, sizes: Sequence[int]) -> Box:
    """Of a run that is whole rows or lies within one."""
    width = math.prod(sizes[1:])
    row, column = divmod(start, width)
    first, *others = piece.offset
    at = first + row - piece.start
    if column == 0 and (stop - start) % width == 0:
        shape = ((stop - start) // width, *sizes[1:])
        return Box(piece, (at, *others), shape, start, stop)
    (along,) = others  # a tensor of more dims than two has whole rows alone, or this fails
    return Box(piece, (at, along + column), (1, stop - start), start, stop)
