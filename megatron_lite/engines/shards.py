"""Where each canonical tensor of a bucket lies in the [dp, n] buffer that collectives carry.

    gradients   accumulators ──pack──▶ [dp, n] ──reduce-scatter──▶ [n] ──▶ this rank's rows
    parameters  this rank's rows ──▶ [n] ──all-gather──▶ [dp, n] ──unpack──▶ parameters

A tensor's rows are cut into dp equal blocks (or one rank owns it whole), so that row k of the
buffer is what rank k owns: named rows of named tensors, not an arbitrary slice of a flat buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_lite.blueprint.ownership import Rows, cut_rows, rows_per_rank, whole_owners
from megatron_lite.parallel.shard import LocalParameter, ParameterPiece


@dataclass(frozen=True, slots=True, eq=False)
class ShardPlace:
    """A piece of a parameter and its columns in the buffer; owner is None where its rows are cut."""

    local: LocalParameter
    piece: ParameterPiece
    block: int
    column: int
    owner: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the piece on this tp rank."""
        return self.piece.stop - self.piece.start

    @property
    def width(self) -> int:
        """Elements per row."""
        parameter = self.local.parameter
        return parameter.numel() // max(parameter.shape[0], 1)

    def owned(self, rank: int, ranks: int) -> Rows:
        """The rows, counted from the piece's first, whose state `rank` keeps."""
        if self.owner is not None:
            return Rows(0, self.rows) if self.owner == rank else Rows(0, 0)
        return cut_rows(self.rows, ranks)[rank]

    def copy(self, buffer: Tensor, tensor: Tensor, *, into_buffer: bool) -> None:
        """Move the piece from a tensor shaped like the parameter into the buffer [dp, n], or back."""
        matrix = self.piece.of(tensor).reshape(self.rows, self.width)
        for inside, outside in self._blocks(buffer, matrix):
            if into_buffer:
                inside.copy_(outside)
            else:
                outside.copy_(inside)

    def _blocks(self, buffer: Tensor, matrix: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs of views, (in the buffer, in the matrix): all full blocks at once, then the rest."""
        rows, width = matrix.shape
        end = self.column + self.block * width
        if self.owner is not None:
            return [(buffer[self.owner, self.column : end].view(rows, width), matrix)]
        # two copies for any number of ranks, not one for each
        full = rows // self.block if self.block else 0
        pairs = []
        if full:
            inside = buffer[:full, self.column : end].view(full, self.block, width)
            pairs.append((inside, matrix[: full * self.block].view(full, self.block, width)))
        rest = rows - full * self.block
        if rest:
            inside = buffer[full, self.column : self.column + rest * width].view(rest, width)
            pairs.append((inside, matrix[full * self.block :]))
        return pairs


@dataclass(frozen=True, slots=True, eq=False)
class ShardLayout:
    """Places of all pieces of one bucket, and n: the elements each rank sends and receives."""

    places: tuple[ShardPlace, ...]
    ranks: int
    columns: int

    @classmethod
    def build(
        cls,
        parameters: Sequence[LocalParameter],
        ranks: int,
        *,
        whole: Callable[[ParameterPiece], float | None],
        loads: list[float] | None = None,
    ) -> ShardLayout:
        """Lay the pieces of these parameters out.

        whole: what the update costs of one that has one owner, None where each row has its own;
        loads: see whole_owners.
        """
        # what has one owner has it where a tp rank's part is empty, too: it is then the same dp rank
        # for all tp ranks
        pieces = [
            (local, piece)
            for local in parameters
            for piece in local.pieces
            if piece.stop > piece.start or whole(piece) is not None
        ]
        places, shared = [], 0
        for local, piece in pieces:
            if whole(piece) is None:
                # a full block of columns for every rank, also where its rows are fewer: all shares
                # of a reduce-scatter are equally long
                rows = piece.stop - piece.start
                block = rows_per_rank(rows, ranks)
                places.append(ShardPlace(local, piece, block, shared))
                shared += block * (_size(local, piece) // rows)
        used = [shared] * ranks
        loads = [0.0] * ranks if loads is None else loads
        alone = [(*one, cost) for one in pieces if (cost := whole(one[1])) is not None]
        # stages that sum its gradient must have it on the same replica, whatever else they hold
        tied = [one for one in alone if one[0].tied_across_stages or one[0].late]
        free = [one for one in alone if one not in tied]
        loads[0] += sum(cost for _, _, cost in tied)
        owners = [0] * len(tied) + [*whole_owners([cost for _, _, cost in free], ranks, loads)]
        for (local, piece, _), owner in zip([*tied, *free], owners, strict=True):
            places.append(ShardPlace(local, piece, piece.stop - piece.start, used[owner], owner))
            used[owner] += _size(local, piece)
        return cls(tuple(places), ranks, max(used))

    def pack(self, tensor_of: Callable[[LocalParameter], Tensor], dtype_like: Tensor) -> Tensor:
        """[dp, n]: every rank's rows of every piece; padding is zero."""
        buffer = dtype_like.new_zeros(self.ranks, self.columns)
        for place in self.places:
            place.copy(buffer, tensor_of(place.local), into_buffer=True)
        return buffer

    def unpack(self, buffer: Tensor, tensor_of: Callable[[LocalParameter], Tensor]) -> None:
        """buffer: [dp, n] -> every rank's rows written to the tensors that tensor_of gives."""
        for place in self.places:
            place.copy(buffer, tensor_of(place.local), into_buffer=False)

    def own_rows(self, rank: int, row: Tensor) -> list[tuple[ShardPlace, Rows, Tensor]]:
        """This rank's rows of each piece, and their view [rows, width] in its row [n] of the buffer."""
        views = []
        for place in self.places:
            rows = place.owned(rank, self.ranks)
            if rows.stop > rows.start:
                size = (rows.stop - rows.start) * place.width
                view = row[place.column : place.column + size].view(-1, place.width)
                views.append((place, rows, view))
        return views

    def own_view(self, place: ShardPlace, rank: int, row: Tensor) -> Tensor:
        """This rank's rows of one piece in its row [n] of the buffer, in their own shape (a view)."""
        rows = place.owned(rank, self.ranks)
        size = (rows.stop - rows.start) * place.width
        shape = (rows.stop - rows.start, *place.local.parameter.shape[1:])
        return row[place.column : place.column + size].view(shape)


def _size(local: LocalParameter, piece: ParameterPiece) -> int:
    return (piece.stop - piece.start) * math.prod(local.parameter.shape[1:])
