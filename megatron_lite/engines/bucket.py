"""Parameters that travel together: where their gradients lie, and the collectives in flight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_lite.blueprint.turns import ALWAYS, Turns
from megatron_lite.engines.shards import ShardLayout
from megatron_lite.parallel.collectives import Pending, start_all_gather
from megatron_lite.parallel.context import Axis
from megatron_lite.parallel.shard import LocalParameter


@dataclass(slots=True, eq=False)
class Bucket:
    """Accumulators in one flat buffer, the parameters they are of, and their collective in flight.

    axis: over which gradients are summed.
    turns: when they train; where that is not always, gradients have memory only then.
    layout is None where every replica keeps the whole state: gradients are then all-reduced in
    place instead of reduce-scattered.
    own: where gradients are shared, this rank's rows of their sums, [columns] of the layout.  The buffer
    then has memory from a first gradient to the reduction alone.
    """

    buffer: Tensor
    locals: list[LocalParameter]
    axis: Axis
    layout: ShardLayout | None
    turns: Turns = ALWAYS
    own: Tensor | None = None
    missing: int = 0
    reducing: Pending | None = None
    reduced: bool = False
    gathering: Pending | None = None

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
        own = self.locals[0].parameter.detach().new_zeros(self.layout.columns)
        for place, rows, values in self.layout.own_rows(self.axis.rank, own):
            source = place.piece.of(place.local.parameter.detach())[rows.start : rows.stop]
            values.copy_(source.reshape(values.shape))
        self.gathering = start_all_gather(own, self.axis)

    def finish_gather(self) -> None:
        """Wait for it and put all rows where they belong."""
        assert self.layout is not None and self.gathering is not None
        rows = self.gathering.wait().view(self.layout.ranks, self.layout.columns)
        self.gathering = None
        self.layout.unpack(rows, lambda local: local.parameter.detach())


def has_memory(tensor: Tensor) -> bool:
    """Whether it is awake."""
    storage = tensor.untyped_storage()
    return storage.nbytes() > 0 or not tensor.numel()


def sleep(tensor: Tensor) -> None:
    """Give its memory back; views of it stay what they are."""
    tensor.untyped_storage().resize_(0)


def wake(tensor: Tensor) -> None:
    """Give it zeros where it has no memory."""
    if not has_memory(tensor):
        tensor.untyped_storage().resize_(tensor.nbytes)
        tensor.zero_()
