"""fp32 gradient accumulators in flat buckets that are reduced over dp as soon as they are full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_lite.parallel.collectives import Pending, start_all_reduce
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import LocalParameter

_ALIGN = 16  # elements: every parameter starts on a cache line


@dataclass(slots=True, eq=False)
class Bucket:
    """A contiguous part of the gradient buffer and the parameters in it."""

    buffer: Tensor
    locals: list[LocalParameter]
    missing: int = 0
    pending: Pending | None = None
    started: bool = False


@dataclass(slots=True, eq=False)
class GradientBuckets:
    """The accumulators of one stage.

    Parameters are walked in reverse, about the order in which backward finishes them.  Buckets
    start in order, so that all dp ranks issue the same collectives whatever their timing.
    """

    buffer: Tensor
    buckets: list[Bucket]
    ctx: ParallelContext
    overlap: bool
    views: dict[Tensor, Tensor] = field(default_factory=dict)
    _bucket_of: dict[Tensor, Bucket] = field(default_factory=dict)
    _armed: bool = False
    _next: int = 0

    @classmethod
    def build(
        cls,
        parameters: Sequence[LocalParameter],
        ctx: ParallelContext,
        *,
        bucket_size: int,
        overlap: bool,
        dtype: torch.dtype = torch.float32,
    ) -> GradientBuckets:
        """Lay the accumulators out; bucket_size in elements."""
        groups: list[list[LocalParameter]] = [[]]
        filled = 0
        for local in reversed(parameters):
            if local.twin or (filled >= bucket_size and groups[-1]):
                groups.append([])
                filled = 0
            groups[-1].append(local)
            filled += local.parameter.numel()
        sizes = [sum(_padded(p) for p in group) for group in groups]
        buffer = torch.zeros(sum(sizes), dtype=dtype, device=ctx.device)
        made = cls(buffer, [], ctx, overlap and ctx.dp.size > 1)
        start = 0
        for group, size in zip(groups, sizes, strict=True):
            bucket = Bucket(buffer[start : start + size], group)
            made.buckets.append(bucket)
            for local in group:
                count = local.parameter.numel()
                made.views[local.parameter] = buffer[start : start + count].view(
                    local.parameter.shape
                )
                made._bucket_of[local.parameter] = bucket
                start += _padded(local)
        return made

    def arm(self) -> None:
        """From now on count gradients, and reduce each bucket when its last one arrives."""
        if not self.overlap:
            return
        self._armed, self._next = True, 0
        for bucket in self.buckets:
            bucket.missing = sum(local.uses for local in bucket.locals)

    def ready(self, parameter: Tensor) -> None:
        """One contribution to the parameter's accumulator is complete."""
        if not self._armed:
            return
        self._bucket_of[parameter].missing -= 1
        while self._next < len(self.buckets) and self.buckets[self._next].missing <= 0:
            self._start(self.buckets[self._next])
            self._next += 1

    def finish(self) -> None:
        """Reduce what is not yet reduced and wait for all.  Collective over dp."""
        for bucket in self.buckets:
            if not bucket.started:
                self._start(bucket)
        for bucket in self.buckets:
            assert bucket.pending is not None
            bucket.pending.wait()
            bucket.pending, bucket.started = None, False
        self._armed = False

    def _start(self, bucket: Bucket) -> None:
        bucket.pending, bucket.started = start_all_reduce(bucket.buffer, self.ctx.dp), True


def _padded(local: LocalParameter) -> int:
    return -(-local.parameter.numel() // _ALIGN) * _ALIGN
