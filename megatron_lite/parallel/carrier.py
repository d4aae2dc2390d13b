"""Who carries out a stage's forward and backward of a micro batch: an engine may have a say in both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


class Carrier(Protocol):
    """Has a say."""

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """Carry out a forward: run()."""
        ...

    def backward(self, end: GradientEdge | Tensor, gradient: Tensor | None) -> None:
        """Carry out backward from where a forward ended; gradient: of its output, None of a loss."""
        ...


class Plainly:
    """Has none."""

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """run()."""
        return run()

    def backward(self, end: GradientEdge | Tensor, gradient: Tensor | None) -> None:
        """autograd's."""
        torch.autograd.backward(end, gradient)
