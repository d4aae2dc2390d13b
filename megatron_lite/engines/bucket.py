"""Parameters that travel together: where gradients and weights lie, and the collectives in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.blueprint.ownership import Rows
from megatron_lite.blueprint.turns import ALWAYS, Turns
from megatron_lite.engines.shards import ShardLayout
from megatron_lite.parallel.collectives import Pending, start_all_gather
from megatron_lite.parallel.context import Axis
from megatron_lite.parallel.shard import LocalParameter, ParameterPiece


@dataclass(slots=True, eq=False)
class Bucket:
    """Accumulators in one flat buffer, the parameters they are of, and their collective in flight.

    axis: over which gradients are summed.
    turns: when they train; where that is not always, gradients have memory only then.
    layout is None where every replica keeps the whole state: gradients are then all-reduced in
    place instead of reduce-scattered.
    own: where gradients are shared, this rank's rows of their sums, [columns] of the layout.  The buffer
    then has memory from a first gradient to the reduction alone.
    shard: where weights are shared, this rank's rows of them, likewise; parameters then have memory only
    while they are whole.
    """

    buffer: Tensor
    locals: list[LocalParameter]
    axis: Axis
    layout: ShardLayout | None
    turns: Turns = ALWAYS
    own: Tensor | None = None
    shard: Tensor | None = None
    missing: int = 0
    reducing: Pending | None = None
    reduced: bool = False
    gathering: Pending | None = None
    is_whole: bool = True

    @property
    def sums(self) -> Tensor:
        """What holds the gradients of a step once they are reduced, flat."""
        return self.buffer if self.own is None else self.own

    @property
    def waits(self) -> bool:
        """Whether it holds gradients that no reduction has begun for."""
        return (
            self.reducing is None and not self.reduced
            if self.own is None
            else has_memory(self.buffer)
        )

    def open(self) -> None:
        """A gradient comes: have room for it."""
        if has_memory(self.sums):  # else it has no turn
            wake(self.buffer)

    def clear(self) -> None:
        """Forget all gradients."""
        self.sums.zero_()
        if self.own is not None:
            sleep(self.buffer)

    def pack(self, view: Callable[[LocalParameter], Tensor]) -> Tensor:
        """All accumulators as a reduce-scatter sends them, [dp * columns]."""
        assert self.layout is not None
        packed = self.layout.pack(view, self.buffer)
        if self.own is not None:
            sleep(self.buffer)
        return packed.view(-1)

    def take(self, view: Callable[[LocalParameter], Tensor]) -> None:
        """Wait for the sum; where sharded, this rank's rows of it go where they belong."""
        assert self.reducing is not None
        summed = self.reducing.wait()
        if self.own is not None:
            self.own.add_(summed)
        elif self.layout is not None:
            for place, rows, values in self.layout.own_rows(self.axis.rank, summed):
                target = place.piece.of(view(place.local))[rows.start : rows.stop]
                target.copy_(values.view(target.shape))
        self.reducing, self.reduced = None, True

    def start_gather(self) -> None:
        """Begin to bring each replica's rows of the parameters to the others, as one packed copy."""
        assert self.layout is not None and self.gathering is None
        own = self._pack_own() if self.shard is None else self.shard
        self.gathering = start_all_gather(own, self.axis)

    def _pack_own(self) -> Tensor:
        assert self.layout is not None
        own = self.locals[0].parameter.detach().new_zeros(self.layout.columns)
        for place, rows, values in self.layout.own_rows(self.axis.rank, own):
            source = place.piece.of(place.local.parameter.detach())[rows.start : rows.stop]
            values.copy_(source.reshape(values.shape))
        return own

    def finish_gather(self) -> None:
        """Wait for it and put all rows where they belong."""
        assert self.layout is not None and self.gathering is not None
        rows = self.gathering.wait().view(self.layout.ranks, self.layout.columns)
        self.gathering = None
        if self.shard is not None:
            for local in self.locals:
                wake(local.parameter.data, zeros=_is_padded(local))
        # .data: autograd need not know that what it keeps of these values was away
        self.layout.unpack(rows, lambda local: local.parameter.data)
        self.is_whole = True

    def take_apart(self) -> None:
        """From now on keep this rank's rows of the parameters, zeros yet, and no others."""
        assert self.layout is not None
        like = self.locals[0].parameter
        self.shard = torch.zeros(self.layout.columns, dtype=like.dtype, device=like.device)
        self.let_go()

    def own_weights(self, local: LocalParameter) -> Iterator[tuple[ParameterPiece, Rows, Tensor]]:
        """This rank's rows of each piece of a parameter, of its shard (views)."""
        assert self.layout is not None and self.shard is not None
        for place in self.layout.places:
            if place.local is local:
                rows = place.owned(self.axis.rank, self.axis.size)
                yield place.piece, rows, self.layout.own_view(place, self.axis.rank, self.shard)

    def own_weight(self, local: LocalParameter, piece: ParameterPiece) -> Tensor | None:
        """Of one piece; None where weights are not shared."""
        if self.shard is None:
            return None
        return next(own for other, _, own in self.own_weights(local) if other is piece)

    def let_go(self) -> None:
        """Nobody reads its weights any more: this rank keeps its rows."""
        assert self.shard is not None and self.gathering is None
        for local in self.locals:
            sleep(local.parameter.data)
        self.is_whole = False


def has_memory(tensor: Tensor) -> bool:
    """Whether it is awake."""
    storage = tensor.untyped_storage()
    return storage.nbytes() > 0 or not tensor.numel()


def sleep(tensor: Tensor) -> None:
    """Give its memory back; views of it stay what they are."""
    tensor.untyped_storage().resize_(0)


def wake(tensor: Tensor, *, zeros: bool = True) -> None:
    """Give it memory where it has none, full of zeros unless all of it will be written."""
    if not has_memory(tensor):
        tensor.untyped_storage().resize_(tensor.nbytes)
        if zeros:
            tensor.zero_()


def _is_padded(local: LocalParameter) -> bool:
    """Whether some rows are in no piece: the vocabulary's padding, which is zero."""
    return sum(piece.stop - piece.start for piece in local.pieces) < local.parameter.shape[0]
