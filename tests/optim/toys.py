"""An optimizer of three rules for tests: matrices with factored moments, tables by Adam, the rest by SGD."""

from __future__ import annotations

import torch

from megatron_lite.blueprint.optimizers import ADAM, MOMENTUM, OPTIMIZERS, State, Treatment
from megatron_lite.optim.rules import RULES

FACTORED = Treatment("factored", (State("row", (0,)), State("column", (1,)), State("mean", ())))
BY_KIND = {"weight": FACTORED, "embedding": ADAM, "norm": MOMENTUM, "bias": MOMENTUM}


class Factored:
    """Adafactor's second moment from its means over columns and rows (arXiv:1804.04235, section 3)."""

    @torch.no_grad()
    def update(self, parameters, gradients, states, *, steps, lr, weight_decay) -> None:
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            square = gradient.square() + 1e-12
            for name, mean in (
                ("row", square.mean(1)), ("column", square.mean(0)), ("mean", square.mean())
            ):  # fmt: skip
                state[name].mul_(0.9).add_(mean, alpha=0.1)
            second = torch.outer(state["row"], state["column"]) / state["mean"]
            parameter.mul_(1.0 - lr * weight_decay).sub_(gradient * second.rsqrt(), alpha=lr)


def install(optimizers=OPTIMIZERS, rules=RULES) -> None:
    """Make --optimizer toy known to this process."""
    optimizers["toy"] = lambda optim, tensor: BY_KIND[tensor.kind]
    rules["factored"] = lambda optim: Factored()
