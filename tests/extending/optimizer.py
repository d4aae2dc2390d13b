"""An optimizer from outside the package: --extend tests/extending/optimizer.py --optimizer signum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.blueprint.optimizers import OPTIMIZERS, State, Treatment
from megatron_lite.optim.rules import RULES


@dataclass(slots=True)
class Signum:
    """The sign of the momentum (arXiv:1802.04434, algorithm 2)."""

    beta: float

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
        """One step, in place."""
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            momentum = state["momentum"].lerp_(gradient, 1.0 - self.beta)
            parameter.mul_(1.0 - lr * weight_decay).sub_(momentum.sign(), alpha=lr)


SIGNUM = Treatment("signum", (State("momentum"),))

OPTIMIZERS["signum"] = lambda optim, tensor: SIGNUM
RULES["signum"] = lambda optim: Signum(optim.sgd_momentum)
