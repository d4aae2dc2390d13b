"""Weights that are shared between replicas, made whole where a layer reads them.

    use 1      use 2      use 3       of a layer: its forward or its backward
    gather 2   gather 3   gather 4    in flight under it, begun in the order of use
    gather 3   gather 4   gather 5

The order of use is that of the last time: replicas run the same layers in the same order, so that they
issue the same collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_lite.blueprint.buckets import IN_FLIGHT
from megatron_lite.engines.bucket import Bucket


@dataclass(frozen=True, slots=True, eq=False)
class SharedLayer:
    """The shared weights that a layer of a stage reads."""

    stage: int
    shared: Sequence[Bucket]


class _Use(NamedTuple):
    layer: SharedLayer
    backward: bool


class WholeWeights:
    """Those of all layers of a rank.

    until_last_backward: a pipeline has many micro batches in flight, whose layers come again and again:
    weights that are whole stay so until their stage's last backward of a step.
    """

    def __init__(self, *, until_last_backward: bool) -> None:
        self._stay = until_last_backward
        self._last: set[int] = set()
        self._flying: list[Bucket] = []
        self._uses: list[_Use] = []
        self._now = 0
        self._is_known = False

    def use(self, layer: SharedLayer, *, backward: bool = False) -> None:
        """Have its weights whole, and the next ones' on their way."""
        if not layer.shared:
            return
        use = _Use(layer, backward)
        self._note(use)
        for bucket in layer.shared:
            if not bucket.is_whole:
                self._start(bucket)
                self._flying.remove(bucket)
                bucket.finish_gather()
        for bucket in self._ahead(use):
            if not bucket.is_whole and len(self._flying) < IN_FLIGHT:
                self._start(bucket)

    def leave(self, layer: SharedLayer, *, backward: bool = False) -> None:
        """It reads no weight any more."""
        if self._stay and not (backward and layer.stage in self._last):
            return
        soon = () if self._stay else list(self._ahead(_Use(layer, backward)))
        for bucket in layer.shared:
            if bucket.is_whole and bucket not in soon:
                bucket.let_go()

    def begin_last_backward(self, stage: int) -> None:
        """Of a step and a stage."""
        self._last.add(stage)

    def let_go(self, buckets: Iterable[Bucket]) -> None:
        """A step's last backward is done, or weights change: none of these stays whole."""
        self._last.clear()
        while self._flying:
            self._flying.pop(0).finish_gather()
        for bucket in buckets:
            if bucket.is_whole:
                bucket.let_go()

    def _note(self, use: _Use) -> None:
        """Know the order of use; it begins anew with the first one."""
        if self._stay:  # of a pipeline the order of first use
            if all(use.layer is not known.layer for known in self._uses):
                self._uses.append(use)
            return
        again = bool(self._uses) and use == self._uses[0]
        if again and self._now + 1 == len(self._uses):
            self._is_known = self._uses[-1].backward
        self._now = 0 if again or not self._uses else self._now + 1
        if self._uses[self._now : self._now + 1] != [use]:
            self._uses[self._now :] = [use]
            self._is_known = False

    def _ahead(self, use: _Use) -> Iterator[Bucket]:
        """Weights that are used next."""
        for layer in self._next_in_pipeline(use) if self._stay else self._next(use):
            yield from layer.shared

    def _next(self, use: _Use) -> Iterator[SharedLayer]:
        # an evaluation has no backward
        evaluates = not use.backward and not torch.is_grad_enabled()
        ahead = self._uses[self._now + 1 : self._now + 1 + IN_FLIGHT]
        if self._is_known and not self._last and use.backward:  # another micro batch follows
            ahead += self._uses[: IN_FLIGHT - len(ahead)]
        for coming in ahead:
            if evaluates and coming.backward:
                return
            yield coming.layer

    def _next_in_pipeline(self, use: _Use) -> Iterator[SharedLayer]:
        known = [known.layer for known in self._uses]
        at = known.index(use.layer) + 1
        for layer in known[at : at + IN_FLIGHT]:
            if not use.backward and not self._last & {use.layer.stage, layer.stage}:
                yield layer

    def _start(self, bucket: Bucket) -> None:
        if bucket not in self._flying:
            bucket.start_gather()
            self._flying.append(bucket)
