"""Where linear layers leave their weight gradients: straight in the accumulator, or on a queue for later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lite.parallel.collectives import Pending, start_all_gather
from megatron_lite.parallel.context import Axis


def _no_span(name: str) -> AbstractContextManager[object]:
    return nullcontext()


def _no_callback(parameter: Tensor) -> None:
    """Default: no callback."""


class WgradOperand(NamedTuple):
    """One side of a weight gradient's product: kept whole, or as this rank's slice over `axis`.

    kept: [s, b, k] where axis has size 1, else [s/axis, b, k] and gathered when it is needed.
    """

    kept: Tensor
    axis: Axis

    def gather(self) -> Pending:
        """Begin making it whole: [s, b, k]."""
        return start_all_gather(self.kept, self.axis)


WgradProduct = Callable[..., Tensor]
"""The kernel of dyᵀx: (dy, x, accumulator or None) -> the sum in the accumulator, or the product."""


class DeferredWgrad(NamedTuple):
    """The gradient dyᵀx of a weight [out, in], waiting for its W."""

    weight: Tensor
    dy: WgradOperand
    x: WgradOperand
    product: WgradProduct

    def gather(self) -> tuple[Tensor, Pending, Pending, WgradProduct]:
        """The same with its operands on their way to being whole."""
        return self.weight, self.dy.gather(), self.x.gather(), self.product


@dataclass(slots=True)
class WeightGradients:
    """Weight-gradient work of one stage.

    Unattached, layers return their weight gradients to autograd as usual.  Attached to an engine's
    fp32 accumulators, they add to them in place and report the parameter ready.  After defer_to(m)
    the matrix products wait in the queue of micro batch m until run(m): the W action of a
    zero-bubble schedule.  Tables, biases and norms cost no product and are never deferred.

    A deferred wgrad keeps its operands as they were split over tp, so that sequence parallelism
    saves between I and W what it saves between F and I; W gathers them, each under the product
    before it.  span: measures every product.
    """

    accumulators: dict[Tensor, Tensor] = field(default_factory=dict)
    ready: Callable[[Tensor], None] = _no_callback
    span: Callable[[str], AbstractContextManager[object]] = _no_span
    _deferred: dict[int, deque[DeferredWgrad]] = field(default_factory=dict)
    _queue: deque[DeferredWgrad] | None = None

    def attach(
        self, accumulators: Iterable[tuple[Tensor, Tensor]], ready: Callable[[Tensor], None]
    ) -> None:
        """Send gradients of these parameters to their accumulators and report each to `ready`.

        accumulators: (parameter, accumulator of its shape), usually fp32, which are added to.
        """
        self.accumulators = dict(accumulators)
        self.ready = ready

    def defers(self, weight: Tensor) -> bool:
        """Whether a product for this weight belongs on the queue now: hand it to defer()."""
        return self._queue is not None and weight in self.accumulators

    def defer(self, product: DeferredWgrad) -> None:
        """Put it on the queue of the micro batch that defer_to() named."""
        assert self._queue is not None, "nothing is deferred"
        self._queue.append(product)

    def matrix(self, weight: Tensor, dy: Tensor, x: Tensor, product: WgradProduct) -> Tensor | None:
        """The gradient dyᵀx of weight [out, in] from dy [..., out] and x [..., in], at once.

        Returns it for autograd when unattached, else None: it is added to the accumulator.
        """
        if weight in self.accumulators:
            self._accumulate(weight, dy, x, product)
            return None
        return product(dy, x)

    def summed(self, weight: Tensor, gradient: Tensor) -> Tensor | None:
        """A gradient of a weight [out, in] that was added up in fp32, and may be overwritten.

        Returns it for autograd when unattached, else None: it is added to the accumulator.
        """
        target = self.accumulators.get(weight)
        if target is None:
            return gradient.to(weight.dtype)
        target.add_(gradient)
        self.ready(weight)
        return None

    def rows(self, weight: Tensor, ids: Tensor, dy: Tensor) -> Tensor | None:
        """The gradient of a table [v, h] looked up at ids [...] with output gradient dy [..., h].

        Returns it for autograd when unattached, else None.
        """
        ids, dy = ids.reshape(-1), dy.reshape(-1, dy.shape[-1])
        target = self.accumulators.get(weight)
        if target is None:
            return torch.zeros_like(weight).index_add_(0, ids, dy)
        target.index_add_(0, ids, dy.to(target.dtype))
        self.ready(weight)
        return None

    def defer_to(self, microbatch: int | None) -> None:
        """From now on defer matrix products to `run(microbatch)`; None: carry them out at once."""
        waiting = None if microbatch is None else self._deferred.setdefault(microbatch, deque())
        self._queue = waiting

    @torch.no_grad()
    def run(self, microbatch: int) -> None:
        """Carry out the deferred wgrads, in the order they came; each operand is freed once it is used.

        Collective over tp where operands are slices: every tp rank runs the same micro batch.
        """
        jobs = self._deferred.pop(microbatch)
        ahead = jobs.popleft().gather() if jobs else None
        while ahead is not None:
            (weight, dy, x, product), ahead = ahead, jobs.popleft().gather() if jobs else None
            self._accumulate(weight, dy.wait(), x.wait(), product)
            del dy, x  # the operands of one product, and of the next, are whole at a time

    @property
    def num_deferred(self) -> int:
        """Micro batches whose products have not run."""
        return len(self._deferred)

    @property
    def pending_wgrads(self) -> list[Tensor]:
        """The weights of all products that have not run, each as often as it will be reported."""
        return [job.weight for jobs in self._deferred.values() for job in jobs]

    def _accumulate(self, weight: Tensor, dy: Tensor, x: Tensor, product: WgradProduct) -> None:
        with self.span("weight-gradient"):
            product(dy, x, self.accumulators[weight])
        self.ready(weight)
