"""One stage: forward and backward of a micro batch, and what backward needs in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_lite.parallel.carrier import Carrier, Plainly


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What every stage gets of one micro batch.

    tokens, labels: int64 [s, b]; loss_mask: fp32 [s, b]; positions: handed to the module as it is.
    extras: [b, ...] each, what the dataset gives the objective beside them.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Any
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scored:
    """An objective's answer for one micro batch, in device scalars that add up over a step.

    total: the loss; count: the weight it is divided by; metrics: what is told beside it, by name.
    """

    total: Tensor
    count: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def detached(self) -> Scored:
        """The numbers, without the graph that made them."""
        metrics = {name: value.detach() for name, value in self.metrics.items()}
        return Scored(self.total.detach(), self.count, metrics)


LossFunction = Callable[[Any, MicroBatch], Scored]
"""An objective's loss of what the last stage's module hands it (layers/outputs.py)."""


class DeferredWgrads(Protocol):
    """The queue on which a split backward defers wgrads."""

    def defer_to(self, microbatch: int | None) -> None:
        """Defer coming wgrads to `run(microbatch)`; None: compute them at once again."""
        ...

    def run(self, microbatch: int) -> None:
        """Compute the deferred wgrads."""
        ...

    @property
    def num_deferred(self) -> int:
        """Micro batches that still hold operands of deferred wgrads."""
        ...

    @property
    def pending_wgrads(self) -> list[Tensor]:
        """The weights of all deferred wgrads, each as often as one is deferred."""
        ...


class _Kept(NamedTuple):
    """What a forward leaves for backward: its input, and where its graph ends.

    The output itself is not kept: once it is sent, its memory is free.  Of the last stage the end
    is the scaled loss.
    """

    entered: Tensor | None
    end: GradientEdge | Tensor


@dataclass(slots=True)
class Stage:
    """Layers of one stage, carried by `module(x, positions)`; the last one, called with a third argument,
    hands it its outputs and returns what it answers: the objective's loss.
    """

    index: int
    module: nn.Module
    is_first: bool
    is_last: bool
    score: LossFunction
    gradients: DeferredWgrads
    carrier: Carrier = field(default_factory=Plainly)
    totals: list[Scored] = field(default_factory=list)
    _kept: dict[int, _Kept] = field(default_factory=dict)

    def forward(
        self, microbatch: int, batch: MicroBatch, received: Tensor | None, scale: Tensor | None
    ) -> Tensor | None:
        """Run the layers; returns the activation for the next stage, None on the last.

        received: [s/tp, b, h] from the stage before.  scale: factor on the loss (loss scale over
        global tokens); None evaluates: nothing is kept for backward.
        """
        training = scale is not None
        if received is not None and training:
            received.requires_grad_(True)
        x = batch.tokens if self.is_first else received
        with torch.set_grad_enabled(training):
            more = (partial(self._loss, batch, scale),) if self.is_last else ()
            left = self.carrier.forward(partial(self.module, x, batch.positions, *more))
        if training:
            end = left if self.is_last else get_gradient_edge(left)
            self._kept[microbatch] = _Kept(received, end)
        return None if self.is_last else left.detach()

    def _loss(self, batch: MicroBatch, scale: Tensor | None, outputs: Any) -> Tensor:
        scored = self.score(outputs.expecting(scale), batch)
        self.totals.append(scored.detached())
        return scored.total if scale is None else scored.total * scale

    def backward(
        self, microbatch: int, received: Tensor | None, *, defer_wgrads: bool = False
    ) -> Tensor | None:
        """Run backward; returns the gradient for the stage before, None on the first.

        received: gradient of what forward returned.  defer_wgrads: leave the weight
        gradients of linear layers to weight_gradients() (zero bubble's I and W).
        """
        entered, end = self._kept.pop(microbatch)
        self.gradients.defer_to(microbatch if defer_wgrads else None)
        self.carrier.backward(end, received)
        self.gradients.defer_to(None)
        return None if entered is None else entered.grad

    def weight_gradients(self, microbatch: int) -> None:
        """Compute the wgrads that backward deferred."""
        self.gradients.run(microbatch)

    @property
    def pending_wgrads(self) -> list[Tensor] | None:
        """The weights of all deferred wgrads; None where nothing is deferred."""
        return self.gradients.pending_wgrads if self.gradients.num_deferred else None

    @property
    def num_live(self) -> int:
        """Micro batches that hold memory here until their backward, or its deferred half, has run."""
        return len(self._kept) + self.gradients.num_deferred

    def take_totals(self) -> list[Scored]:
        """The objective's answers since the last call, in order of micro batches."""
        taken = list(self.totals)
        self.totals.clear()  # of every stage that was made of this one, too
        return taken
