"""What an engine does around the forward and the backward of a layer."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.engines.bucket import Bucket


class GradientHooks:
    """Gradients have memory from a layer's backward on."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets

    def before_forward(self) -> None:
        """Nothing: weights are whole."""

    def after_forward(self) -> None:
        """Nothing."""

    def before_backward(self) -> None:
        """Gradients of this layer come."""
        for bucket in self._buckets:
            bucket.open()

    def after_backward(self) -> None:
        """Nothing: a bucket is reduced when it is full."""
