"""What an engine does around the forward and the backward of a layer."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.engines.bucket import Bucket
from megatron_lite.engines.whole import SharedLayer, WholeWeights


class LayerMemory:
    """Gradients have memory from a layer's backward on, and weights where it reads them."""

    def __init__(
        self, learned: Sequence[Bucket], layer: SharedLayer, weights: WholeWeights
    ) -> None:
        self._learned, self._layer, self._weights = learned, layer, weights

    def before_forward(self) -> None:
        """Its weights are made whole."""
        self._weights.use(self._layer)

    def after_forward(self) -> None:
        """And let go."""
        self._weights.leave(self._layer)

    def before_backward(self, *, reads: bool) -> None:
        """Gradients of this layer come."""
        for bucket in self._learned:
            bucket.open()
        if reads:
            self._weights.use(self._layer, backward=True)

    def after_backward(self) -> None:
        """Gradients are reduced when their bucket is full, not here."""
        self._weights.leave(self._layer, backward=True)
