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
from megatron_lite.blueprint.turns import ALWAYS, NEVER, Turns
from megatron_lite.engines.bucket import Bucket, has_memory, sleep, wake
from megatron_lite.engines.shards import ShardLayout
from megatron_lite.parallel.collectives import start_all_reduce, start_reduce_scatter
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import LocalParameter, ParameterPiece

_ALIGN = 16  # elements: every parameter starts on a cache line


@dataclass(slots=True, eq=False)
class Reductions:
    """Those of a rank in flight, of whichever of its stages, oldest first: a bucket, and where its sums go."""

    buckets: deque[tuple[Bucket, Callable[[LocalParameter], Tensor]]] = field(default_factory=deque)

    def take_oldest(self) -> None:
        """Wait for the sum that has been longest in flight."""
        bucket, view = self.buckets.popleft()
        bucket.take(view)

    def take_all(self) -> None:
        """Wait for all of them."""
        while self.buckets:
            self.take_oldest()


@dataclass(slots=True, eq=False)
class GradientBuckets:
    """The accumulators of one stage; buckets that have no turn wait for nothing and communicate nothing.

    Parameters are walked in reverse, about the order in which backward finishes them.  Buckets
    start in that order, what is complete when armed before the others, so that all replicas issue
    the same collectives whatever their timing.

    each_backward: a bucket is reduced in every backward, not in the last one alone, and this rank's rows
    of the sums add up.  They are then added in another order than elsewhere: over ranks first.
    """

    buckets: list[Bucket]
    overlap: bool
    each_backward: bool
    whole: Callable[[ParameterPiece], float | None]
    _flying: Reductions
    awake: list[Bucket] = field(default_factory=list)
    views: dict[Tensor, Tensor] = field(default_factory=dict)
    _bucket_of: dict[Tensor, Bucket] = field(default_factory=dict)
    _own_sums: dict[tuple[Tensor, int], Tensor] = field(default_factory=dict)
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
        shares_gradients: bool = False,
        each_backward: bool = False,
        whole: Callable[[ParameterPiece], float | None] = lambda piece: None,
        loads: dict[str, list[float]] | None = None,
        flying: Reductions | None = None,
        turns: Callable[[LocalParameter], Turns] = lambda local: ALWAYS,
        layer_of: Callable[[LocalParameter], str | None] = lambda local: None,
        dtype: torch.dtype = torch.float32,
    ) -> GradientBuckets:
        """Lay the accumulators out; bucket_size in elements.  Only those of ALWAYS have memory yet: wake().

        sharded: each replica keeps its rows of the state only; shares_gradients: and of the sums of
        gradients; whole: of which pieces all or none, and the cost of their update; loads: that of each
        axis' ranks, for what is laid out next; flying: reductions of this rank's stages; layer_of: where
        weights are shared, the layer that one lies in, whose weights are one bucket of whatever size.
        """
        loads = {} if loads is None else loads
        overlaps = overlap and any(p.replicas(ctx).size > 1 for p in parameters)
        flying = Reductions() if flying is None else flying
        made = cls([], overlaps, each_backward, whole, flying)
        for turn, group in _grouped(parameters, bucket_size, turns, layer_of):
            axis = group[0].replicas(ctx)
            load = loads.setdefault(axis.name, [0.0] * axis.size)
            layout = (
                ShardLayout.build(group, axis.size, whole=whole, loads=load) if sharded else None
            )
            buffer = torch.zeros(sum(map(_padded, group)), dtype=dtype, device=ctx.device)
            own = buffer.new_zeros(layout.columns) if layout and shares_gradients else None
            bucket, start = Bucket(buffer, group, axis, layout, turn, own), 0
            for local in group:  # while there is memory: else no views can be made
                count = local.parameter.numel()
                view = buffer[start : start + count].view(local.parameter.shape)
                made.views[local.parameter] = view
                made._bucket_of[local.parameter] = bucket
                start += _padded(local)
            if layout is not None and own is not None:
                for place in layout.places:
                    rows = layout.own_view(place, axis.rank, own)
                    made._own_sums[place.local.parameter, place.piece.start] = rows
            if layer_of(group[0]) is not None:
                bucket.take_apart()
            made.buckets.append(bucket)
            made.wake(lambda turn: turn == ALWAYS)  # all of them together need not fit
        return made

    def wake(self, has_turn: Callable[[Turns], bool]) -> None:
        """Have accumulators of these turns alone: zero where they are new, no memory for the others.

        Views stay what they are.
        """
        self.awake = [bucket for bucket in self.buckets if has_turn(bucket.turns)]
        for bucket in self.buckets:
            if bucket.own is not None or bucket not in self.awake:
                sleep(bucket.buffer)
            if bucket not in self.awake:
                sleep(bucket.sums)
        for bucket in self.awake:
            wake(bucket.sums)
        self._stand_ready()

    def holds(self, local: LocalParameter) -> bool:
        """Whether there is memory for the gradient of a parameter."""
        return self._bucket_of[local.parameter] in self.awake

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

    def own_sum(self, local: LocalParameter, piece: ParameterPiece) -> Tensor | None:
        """Where gradients are shared, this rank's rows of a piece's sum (a view)."""
        return self._own_sums.get((local.parameter, piece.start))

    def begin_last_backward(self, pending_wgrads: Sequence[Tensor] | None = None) -> None:
        """From now on count gradients, and reduce each bucket when its last one arrives.

        pending_wgrads: the parameters still to be reported, each as often; a bucket without any starts
        here.  None: every parameter that has a gradient will be, as often as one backward uses it.
        """
        if not self.overlap or self.each_backward:
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

    def _stand_ready(self) -> None:
        """Where each backward is reduced: await the next one's gradients."""
        self._armed = self.each_backward
        if self.each_backward:
            for bucket in self.awake:
                bucket.missing = sum(map(_reports, bucket.locals))
            # what comes after all backwards waits for finish()
            self._coming = deque(b for b in self.awake if 0 < b.missing < sys.maxsize)

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
            if not self._coming:
                self._stand_ready()

    def finish(self) -> None:
        """Reduce what is not yet reduced and wait for all.  Collective over the replicas.

        Afterwards the accumulators hold the sum: all of it, or this rank's rows where sharded.
        """
        # without overlap all of them; with it the table that another stage of this rank uses as
        # well, which counts as never complete before all backwards are done
        for bucket in self.awake:
            if bucket.waits:
                self._start(bucket)
        self._flying.take_all()
        for bucket in self.awake:
            bucket.reduced = False
        self._armed = False
        self._stand_ready()

    def _start(self, bucket: Bucket) -> None:
        while bucket.reducing is not None:  # that of the backward before
            self._flying.take_oldest()
        if bucket.layout is None:
            bucket.reducing = start_all_reduce(bucket.buffer, bucket.axis)
        elif bucket.own is None or has_memory(bucket.buffer):
            if len(self._flying.buckets) >= IN_FLIGHT:
                self._flying.take_oldest()
            bucket.reducing = start_reduce_scatter(bucket.pack(self.view), bucket.axis)
        else:  # nothing has come
            return
        self._flying.buckets.append((bucket, self.view))
        if self.each_backward and not self.overlap:
            self._flying.take_oldest()

    def bucket_of(self, parameter: Tensor) -> Bucket:
        """The bucket that a parameter lies in."""
        return self._bucket_of[parameter]


def _grouped(
    parameters: Sequence[LocalParameter],
    bucket_size: int,
    turns: Callable[[LocalParameter], Turns],
    layer_of: Callable[[LocalParameter], str | None],
) -> list[tuple[Turns, list[LocalParameter]]]:
    """Groups of about bucket_size elements, or of a layer, in reverse order of the parameters.

    The gradients of a group are summed over one axis and stored in one number format, in the same steps.
    """
    groups: list[tuple[Turns, list[LocalParameter]]] = []
    open_groups: dict[tuple[str, torch.dtype, Turns, str | None], list[LocalParameter]] = {}
    for local in reversed(parameters):
        turn, layer = turns(local), layer_of(local)
        kind = local.over, local.parameter.dtype, turn, layer
        group = open_groups.get(kind)
        size = sum(p.parameter.numel() for p in group or ())
        full = layer is None and size >= bucket_size
        if group is None or full or local.tied_across_stages or local.late:
            group = open_groups[kind] = []
            groups.append((turn, group))
        group.append(local)
    return groups


def frozen_weights(
    parameters: Sequence[LocalParameter],
    ctx: ParallelContext,
    layer_of: Callable[[LocalParameter], str | None],
) -> list[Bucket]:
    """Weights that are shared and never trained: buckets without gradients, a layer each."""
    shared = [local for local in parameters if layer_of(local) is not None]
    made = []
    for _, group in _grouped(shared, 0, lambda local: NEVER, layer_of):
        axis = group[0].replicas(ctx)
        layout = ShardLayout.build(group, axis.size, whole=lambda piece: None)
        bucket = Bucket(torch.empty(0, device=ctx.device), group, axis, layout, NEVER)
        bucket.take_apart()
        made.append(bucket)
    return made


def _reports(local: LocalParameter) -> int:
    """How often one backward reports a gradient for it; 0 where it is frozen.

    maxsize where it comes after all of them, so that its bucket waits for finish().
    """
    if local.late:
        return sys.maxsize
    return local.grads_per_backward if local.parameter.requires_grad else 0


def _padded(local: LocalParameter) -> int:
    return -(-local.parameter.numel() // _ALIGN) * _ALIGN
