"""An optimizer from outside the package: --extend tests/extending/optimizer.py --optimizer lion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.blueprint.optimizers import OPTIMIZERS, State, Treatment
from megatron_lite.optim.rules import RULES


@dataclass(slots=True)
class Lion:
    """The sign of a mean of gradient and momentum (arXiv:2302.06675, program 1)."""

    beta1: float
    beta2: float

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
            sign = state["momentum"].lerp(gradient, 1.0 - self.beta1).sign_()
            parameter.mul_(1.0 - lr * weight_decay).sub_(sign, alpha=lr)
            state["momentum"].lerp_(gradient, 1.0 - self.beta2)


LION = Treatment("lion", (State("momentum"),))

OPTIMIZERS["lion"] = lambda optim, tensor: LION
RULES["lion"] = lambda optim: Lion(optim.adam_beta1, optim.adam_beta2)
