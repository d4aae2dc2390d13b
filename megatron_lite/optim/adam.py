"""AdamW (arXiv:1711.05101): math only, on lists of tensors; torch's fused kernel where it exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw


@dataclass(slots=True)
class AdamW:
    """theta -= lr (wd theta + m^ / (sqrt(v^) + eps)) with bias-corrected moments m^ and v^.

    States are named tensors beside each parameter (blueprint/optimizers.py); a rule sees real rows
    or real matrices.
    """

    beta1: float
    beta2: float
    eps: float

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
        """One step, in place, of tensors of any shapes with gradients and moments of the same.

        steps: updates done before this one, for the bias correction; lr and weight_decay: this step's.
        """
        if not parameters:
            return
        # a counter of its own per tensor, all from one fill: torch's kernels add one to each
        device = parameters[0].device
        count = torch.full((len(parameters),), float(steps), device=device).unbind()
        adamw(
            list(parameters), list(gradients),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [], list(count),
            fused=device.type in ("cpu", "cuda"),
            amsgrad=False, beta1=self.beta1, beta2=self.beta2, lr=lr,
            weight_decay=weight_decay, eps=self.eps, maximize=False,
        )  # fmt: skip
