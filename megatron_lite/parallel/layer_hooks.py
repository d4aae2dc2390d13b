"""What is called around a layer's forward and backward: a place to make its weights whole."""

from __future__ import annotations

from typing import Protocol


class LayerHooks(Protocol):
    """The layer's weights are only read between before and after: elsewhere they may be shards, or freed.

    The calls of a rank's layers never overlap.  A layer that is recomputed in backward calls those
    of its recomputed forward.  A deferred wgrad (the W of a split backward) reads no
    weight and comes later; which gradients are complete is told to Engine.ready, not here.
    """

    def before_forward(self) -> None:
        """The layer's forward comes next."""
        ...

    def after_forward(self) -> None:
        """It is done; autograd keeps references to the weights, whose values it reads in backward."""
        ...

    def before_backward(self, *, reads: bool) -> None:
        """The gradient of the layer's output has come.  reads: whether weights are read in this backward."""
        ...

    def after_backward(self) -> None:
        """The gradient of its input is complete."""
        ...
