"""Where linear layers leave their weight gradients: straight in the accumulator, or on a queue for later."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def _nothing(parameter: Tensor) -> None:
    """Nobody waits for this gradient."""


@dataclass(slots=True)
class WeightGradients:
    """Weight-gradient work of one stage.

    Unattached, layers return their weight gradients to autograd as usual.  Attached to an engine's
    fp32 accumulators, they add to them in place and report the parameter ready.  After postpone(m)
    the matrix products wait in the queue of micro batch m until run(m): the W action of a
    zero-bubble schedule.  Tables, biases and norms cost no product and are never postponed.
    """

    accumulators: dict[Tensor, Tensor] = field(default_factory=dict)
    ready: Callable[[Tensor], None] = _nothing
    _postponed: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    _queue: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def attach(
        self, accumulators: Iterable[tuple[Tensor, Tensor]], ready: Callable[[Tensor], None]
    ) -> None:
        """Send gradients of these parameters to their accumulators and report each to `ready`.

        accumulators: (parameter, accumulator of its shape), usually fp32, which are added to.
        """
        self.accumulators = dict(accumulators)
        self.ready = ready

    def matrix(self, weight: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
        """The gradient dyᵀx of weight [out, in] from dy [..., out] and x [..., in].

        Returns it for autograd when unattached, else None: it is added now, or on the queue.
        """
        dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        if weight not in self.accumulators:
            return dy.t() @ x
        if self._queue is not None:
            self._queue.append((weight, dy, x))
        else:
            self._accumulate(weight, dy, x)
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

    def postpone(self, microbatch: int | None) -> None:
        """From now on leave matrix products to run(microbatch); None: carry them out at once."""
        self._queue = None if microbatch is None else self._postponed.setdefault(microbatch, [])

    @torch.no_grad()
    def run(self, microbatch: int) -> None:
        """Carry out what was postponed, in the order it came; each input is freed once it is used."""
        jobs = self._postponed.pop(microbatch)
        jobs.reverse()
        while jobs:
            self._accumulate(*jobs.pop())

    @property
    def num_postponed(self) -> int:
        """Micro batches whose products have not run."""
        return len(self._postponed)

    def _accumulate(self, weight: Tensor, dy: Tensor, x: Tensor) -> None:
        target = self.accumulators[weight]
        if target.dtype == dy.dtype:
            target.addmm_(dy.t(), x)
        else:
            target.add_(dy.t() @ x)
        self.ready(weight)
