"""fp32 gradient accumulators in flat buckets that are reduced over the replicas as soon as they are full."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_lite.blueprint.buckets import IN_FLIGHT
from megatron_lite.blueprint.ownership import Rows
from megatron_lite.blueprint.turns import ALWAYS, Turns
from megatron_lite.engines.shards import ShardLayout
from megatron_lite.parallel.collectives import (
    Pending,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_lite.parallel.context import Axis, ParallelContext
from megatron_lite.parallel.shard import LocalParameter, ParameterPiece

_ALIGN = 16  # elements: every parameter starts on a cache line


@dataclass(slots=True, eq=False)
class Bucket:
    """A contiguous part of the gradient buffer, the parameters in it, and its collective in flight.

    axis: over which their gradients are summed.
    turns: when they train; where that is not always, their part of the buffer has memory only then.
    layout is None where every replica keeps the whole state: gradients are then all-reduced in
    place instead of reduce-scattered.
    """

    buffer: Tensor
    locals: list[LocalParameter]
    axis: Axis
    layout: ShardLayout | None
    turns: Turns = ALWAYS
    missing: int = 0
    reducing: Pending | None = None
    reduced: bool = False
    gathering: Pending | None = None

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


@dataclass(slots=True, eq=False)
class GradientBuckets:
    """The accumulators of one stage; buckets that have no turn wait for nothing and communicate nothing.

    Parameters are walked in reverse, about the order in which backward finishes them.  Buckets
    start in that order, what is complete when armed before the others, so that all replicas issue
    the same collectives whatever their timing.
    """

    buckets: list[Bucket]
    overlap: bool
    whole: Callable[[ParameterPiece], float | None]
    _whole: dict[Turns, Tensor]
    awake: list[Bucket] = field(default_factory=list)
    views: dict[Tensor, Tensor] = field(default_factory=dict)
    _bucket_of: dict[Tensor, Bucket] = field(default_factory=dict)
    _armed: bool = False
    _coming: deque[Bucket] = field(default_factory=deque)

    @classmethod
    def build(
        cls,
        parameters: Sequence[LocalParameter],
        ctx: ParallelContext,
        *,
        bucket_size: int,
        overlap: bool,
        sharded: bool = False,
        whole: Callable[[ParameterPiece], float | None] = lambda piece: None,
        loads: dict[str, list[float]] | None = None,
        turns: Callable[[LocalParameter], Turns] = lambda local: ALWAYS,
        dtype: torch.dtype = torch.float32,
    ) -> GradientBuckets:
        """Lay the accumulators out; bucket_size in elements.  Only those of ALWAYS have memory yet: wake().

        sharded: each replica keeps its rows of the state only; whole: of which pieces all or none, and
        the cost of their update; loads: that of each axis' ranks, for what is laid out next.
        """
        loads = {} if loads is None else loads
        groups = _grouped(parameters, bucket_size, turns)
        sizes: Counter[Turns] = Counter()
        for turn, group in groups:
            sizes[turn] += sum(map(_padded, group))
        buffers = {}
        for turn, size in sizes.items():
            buffers[turn] = torch.zeros(size, dtype=dtype, device=ctx.device)
            _sleep(buffers[turn], turn)  # all of them together need not fit
        overlaps = overlap and any(p.replicas(ctx).size > 1 for p in parameters)
        made, starts = cls([], overlaps, whole, buffers), dict.fromkeys(buffers, 0)
        for turn, group in groups:
            axis, start = group[0].replicas(ctx), starts[turn]
            load = loads.setdefault(axis.name, [0.0] * axis.size)
            layout = (
                ShardLayout.build(group, axis.size, whole=whole, loads=load) if sharded else None
            )
            end = starts[turn] = start + sum(map(_padded, group))
            _wake(buffers[turn])  # views can be made of what is there alone
            bucket = Bucket(buffers[turn][start:end], group, axis, layout, turn)
            made.buckets.append(bucket)
            for local in group:
                count = local.parameter.numel()
                view = buffers[turn][start : start + count].view(local.parameter.shape)
                made.views[local.parameter] = view
                made._bucket_of[local.parameter] = bucket
                start += _padded(local)
            _sleep(buffers[turn], turn)
        made.wake(lambda turn: turn == ALWAYS)
        return made

    def wake(self, has_turn: Callable[[Turns], bool]) -> None:
        """Have accumulators of these turns alone: zero where they are new, no memory for the others.

        Views stay what they are.
        """
        awake = {turn for turn in self._whole if has_turn(turn)}
        for turn in self._whole.keys() - awake:
            _sleep(self._whole[turn], turn)
        for turn in awake:
            _wake(self._whole[turn])
        self.awake = [bucket for bucket in self.buckets if bucket.turns in awake]

    def holds(self, local: LocalParameter) -> bool:
        """Whether there is memory for the gradient of a parameter."""
        return self._bucket_of[local.parameter] in self.awake

    def buffers(self) -> list[Tensor]:
        """All accumulators that there is memory for, flat."""
        turns = {bucket.turns for bucket in self.awake}
        return [buffer for turn, buffer in self._whole.items() if turn in turns]

    def view(self, local: LocalParameter) -> Tensor:
        """The accumulator of a parameter: a view of its shape in the flat buffer, fp32 by default."""
        return self.views[local.parameter]

    def owned(self, local: LocalParameter) -> Iterator[tuple[ParameterPiece, Rows]]:
        """The rows of each of its pieces whose state this rank keeps; of what stays whole perhaps none."""
        bucket = self._bucket_of[local.parameter]
        if bucket.layout is None:
            for piece in local.pieces:
                # a tp rank whose part of the vocabulary is all padding has no row of it
                if piece.stop > piece.start or self.whole(piece) is not None:
                    yield piece, Rows(0, piece.stop - piece.start)
            return
        for place in bucket.layout.places:
            if place.local is local:
                rows = place.owned(bucket.axis.rank, bucket.axis.size)
                if rows.stop > rows.start or place.owner == bucket.axis.rank:
                    yield place.piece, rows

    def begin_last_backward(self, pending_wgrads: Sequence[Tensor] | None = None) -> None:
        """From now on count gradients, and reduce each bucket when its last one arrives.

        pending_wgrads: the parameters still to be reported, each as often; a bucket without any starts
        here.  None: every parameter that has a gradient will be, as often as one backward uses it.
        """
        if not self.overlap:
            return
        self._armed = True
        coming = None if pending_wgrads is None else Counter(pending_wgrads)
        for bucket in self.awake:
            bucket.missing = sum(
                _reports(local) if coming is None or local.late else coming[local.parameter]
                for local in bucket.locals
            )
        # Complete buckets start now and may not queue behind one that waits for a deferred wgrad.
        # Replicas must issue equal collectives in equal order: the sort is stable, and `missing` is
        # the same on all of them, because their queues hold the same products.
        self._coming = deque(sorted(self.awake, key=lambda bucket: bucket.missing > 0))
        self._start_full()

    def ready(self, parameter: Tensor) -> None:
        """One contribution to the parameter's accumulator is complete; starts each bucket that is full now.

        All replicas must report the same parameters, in whatever order.
        """
        if not self._armed:
            return
        self._bucket_of[parameter].missing -= 1
        self._start_full()

    def _start_full(self) -> None:
        """Start the buckets that wait for nothing, up to the first that does."""
        # in order, though a later bucket may be full: collectives of a group are matched by their
        # order, and nothing promises that the replicas' backwards report in the same one
        while self._coming and self._coming[0].missing <= 0:
            self._start(self._coming.popleft())

    def finish(self) -> None:
        """Reduce what is not yet reduced and wait for all.  Collective over the replicas.

        Afterwards the accumulators hold the sum: all of it, or this rank's rows where sharded.
        """
        # without overlap all of them; with it the table that another stage of this rank uses as
        # well, which counts as never complete before all backwards are done
        for bucket in self.awake:
            if bucket.reducing is None and not bucket.reduced:
                self._start(bucket)
        for bucket in self.awake:
            if bucket.reducing is not None:
                self._take(bucket)
            bucket.reduced = False
        self._armed = False

    def _start(self, bucket: Bucket) -> None:
        if bucket.layout is None:
            bucket.reducing = start_all_reduce(bucket.buffer, bucket.axis)
            return  # in place: any number may be in flight at no cost in memory
        under_way = [other for other in self.buckets if other.reducing is not None]
        if len(under_way) >= IN_FLIGHT:
            self._take(under_way[0])
        packed = bucket.layout.pack(self.view, bucket.buffer)
        bucket.reducing = start_reduce_scatter(packed.view(-1), bucket.axis)

    def _take(self, bucket: Bucket) -> None:
        """Wait for a bucket's sum; where sharded, put this rank's rows into its accumulators."""
        assert bucket.reducing is not None
        summed = bucket.reducing.wait()
        if bucket.layout is not None:
            for place, rows, values in bucket.layout.own_rows(bucket.axis.rank, summed):
                target = place.piece.of(self.view(place.local))[rows.start : rows.stop]
                target.copy_(values.view(target.shape))
        bucket.reducing, bucket.reduced = None, True

    def bucket_of(self, parameter: Tensor) -> Bucket:
        """The bucket that a parameter lies in."""
        return self._bucket_of[parameter]


def _grouped(
    parameters: Sequence[LocalParameter],
    bucket_size: int,
    turns: Callable[[LocalParameter], Turns],
) -> list[tuple[Turns, list[LocalParameter]]]:
    """Groups of about bucket_size elements, in reverse order of the parameters.

    The gradients of a group are summed over one axis and stored in one number format, in the same steps.
    """
    groups: list[tuple[Turns, list[LocalParameter]]] = []
    open_groups: dict[tuple[str, torch.dtype, Turns], list[LocalParameter]] = {}
    for local in reversed(parameters):
        turn = turns(local)
        kind = local.over, local.parameter.dtype, turn
        group = open_groups.get(kind)
        full = group is not None and sum(p.parameter.numel() for p in group) >= bucket_size
        if group is None or full or local.tied_across_stages or local.late:
            group = open_groups[kind] = []
            groups.append((turn, group))
        group.append(local)
    return groups


def _sleep(buffer: Tensor, turn: Turns) -> None:
    """Give its memory back, where it is not used in every step; views of it stay."""
    if turn != ALWAYS:
        buffer.untyped_storage().resize_(0)


def _wake(buffer: Tensor) -> None:
    """Give it zeros where it has no memory."""
    if buffer.untyped_storage().nbytes() < buffer.nbytes:
        buffer.untyped_storage().resize_(buffer.nbytes)
        buffer.zero_()


def _reports(local: LocalParameter) -> int:
    """How often one backward reports a gradient for it; 0 where it is frozen.

    maxsize where it comes after all of them, so that its bucket waits for finish().
    """
    if local.late:
        return sys.maxsize
    return local.grads_per_backward if local.parameter.requires_grad else 0


def _padded(local: LocalParameter) -> int:
    return -(-local.parameter.numel() // _ALIGN) * _ALIGN
