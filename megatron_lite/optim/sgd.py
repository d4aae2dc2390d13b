"""SGD with momentum and coupled weight decay, as torch's and Megatron's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(slots=True)
class SGD:
    """buf = momentum buf + (g + wd theta); theta -= lr buf."""

    momentum: float
    needs_whole_matrix: bool = field(default=False, init=False)

    state_names: ClassVar[tuple[str, ...]] = ("momentum",)

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """A zero momentum buffer; none without momentum."""
        return {"momentum": torch.zeros_like(parameter)} if self.momentum else {}

    @torch.no_grad()
    def update(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        *,
        steps: int,
        lr: float,
        weight_decay: float,
    ) -> None:
        """One step, in place, of tensors of any shapes; steps: updates done before this one (unused)."""
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            change = gradient
            if weight_decay:
                change = gradient.add(parameter, alpha=weight_decay)
            if self.momentum:
                change = state["momentum"].mul_(self.momentum).add_(change)
            parameter.add_(change, alpha=-lr)
