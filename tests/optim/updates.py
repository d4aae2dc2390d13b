"""Gradients as a schedule meets them, and what every update rule keeps to."""

from __future__ import annotations

import math

import torch

from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.groups import Groups
from megatron_lite.optim.rules import RULES

STEPS = 7
LEARNING_RATES = [0.0, 1e-3, 5e-3, 2e-2, 1e-2, 3e-3, 1e-3]  # as a schedule changes them


def drawn(
    shape: tuple[int, ...] = (5, 3), steps: int = STEPS, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A parameter and its gradients, which are of many sizes."""
    generator = torch.Generator().manual_seed(11)

    def draw(scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    # gradients over six orders of magnitude: epsilon counts in the small ones
    return draw(), [draw(10.0 ** -(k % 7)) for k in range(steps)]


def new_state(optim: OptimConfig, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the engine would hold of rows of a large matrix before its first update."""
    spec = Tensor("matrix.weight", (4096, *parameter.shape[1:]), "weight")
    return Groups(optim).new_state(spec, parameter)


def require_left_out(optim: OptimConfig) -> None:
    """An update that the device does not take changes no bit, whatever is in its gradients."""
    rule = RULES[optim.optimizer](optim)
    values, gradients = drawn(dtype=torch.float32)
    values[0, 0] = -0.0
    held = {
        at: (values.clone(), new_state(optim, values)) for at in ("waits", "decided", "left out")
    }

    def update(at: str, gradient: torch.Tensor, steps: int, **decided: torch.Tensor) -> None:
        parameter, state = held[at]
        rule.update(
            [parameter], [gradient], [state], steps=steps, lr=1e-2, weight_decay=0.1, **decided
        )

    def bits(at: str) -> list[bytes]:
        parameter, state = held[at]
        tensors = [parameter, *state.values()]
        return [x.view(torch.uint8).numpy().tobytes() for x in tensors]

    yes, no = torch.tensor(True), torch.tensor(False)
    for steps, gradient in enumerate(gradients):
        update("waits", gradient, steps)
        update("decided", gradient, steps, taken=yes)
        update("left out", gradient, steps, taken=yes)
        bad = gradient.clone()
        bad[1, 1], bad[2, 2] = math.nan, math.inf
        update("left out", bad, steps + 1, taken=no)
        assert bits("decided") == bits("waits") == bits("left out")


def require_each_alone(optim: OptimConfig) -> None:
    """Several tensors are updated as if alone; a rank may own none."""
    rule = RULES[optim.optimizer](optim)
    tensors = [drawn((n, 2))[0] for n in (1, 4, 3)]
    gradients = [drawn((n, 2))[1][0] for n in (1, 4, 3)]
    together = [t.clone() for t in tensors]
    states = [new_state(optim, t) for t in tensors]
    rule.update(together, gradients, states, steps=2, lr=0.1, weight_decay=0.1)
    for tensor, gradient, result in zip(tensors, gradients, together, strict=True):
        alone = tensor.clone()
        state = [new_state(optim, alone)]
        rule.update([alone], [gradient], state, steps=2, lr=0.1, weight_decay=0.1)
        torch.testing.assert_close(result, alone, rtol=1e-14, atol=0)
    rule.update([], [], [], steps=0, lr=0.1, weight_decay=0.1)
