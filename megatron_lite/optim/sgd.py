"""SGD with momentum and coupled weight decay, as torch's and Megatron's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class SGD:
    """buf = momentum buf + (g + wd theta); theta -= lr buf; no buffer without momentum."""

    momentum: float

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
        taken: Tensor | None = None,
    ) -> None:
        """One step, in place, of tensors of any shapes; steps: updates done before this one (unused).

        taken: see UpdateRule.
        """
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            change = gradient
            if weight_decay:
                change = gradient.add(parameter, alpha=weight_decay)
            if self.momentum:
                buffer = state["momentum"]
                change = (
                    (buffer if taken is None else buffer.clone()).mul_(self.momentum).add_(change)
                )
                if taken is not None:
                    buffer.copy_(change.where(taken, buffer))
            if taken is not None:
                change = change.where(taken, 0.0)
            parameter.add_(change, alpha=-lr)
