"""Sophia-G (arXiv:2305.14342): steps by curvature, none larger than the learning rate.

    every k-th step   h = beta2 h + (1 - beta2) B g~^2      g~: gradient of labels drawn from the model
    every step        m = beta1 m + (1 - beta1) g
                      theta -= lr (wd theta + clip(m / (rho h + eps), 1))

h holds the estimate of the Gauss-Newton diagonal itself, B (the tokens that g~ is the mean over)
included: it may change from step to step.  rho is gamma of the paper and rho of its code, which has
B beside it instead; the preprint's first version clips at rho, so that its lr is this one's / rho.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.optim.portions import Columns, portions, slabs, widened
from megatron_lite.optim.stepping import Tensors, keep, step_by

_EPSILON = 1e-15
_COUNTED = 1 << 22
"""Elements that are counted at a time."""


@dataclass(slots=True)
class SophiaG:
    """The update; h is what observe() has made of it."""

    beta1: float
    rho: float

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
        """One step, in place, of tensors of any shapes; steps: updates done before this one.

        taken: see UpdateRule.
        """
        for portion in portions(slabs(parameters, gradients, states, ("exp_avg", "hessian"))):
            with widened(portion, update=steps) as held:
                self._update(held, lr, weight_decay, taken)

    def _update(self, held: Columns, lr: float, weight_decay: float, taken: Tensor | None) -> None:
        there, hessians = held.states
        momenta: Tensors = there
        if taken is None:
            torch._foreach_lerp_(momenta, held.gradients, 1.0 - self.beta1)
        else:
            momenta = torch._foreach_lerp(there, held.gradients, 1.0 - self.beta1)
        limits = torch._foreach_mul(hessians, self.rho)
        torch._foreach_add_(limits, _EPSILON)
        change = torch._foreach_div(momenta, limits)
        torch._foreach_clamp_max_(change, 1.0)
        torch._foreach_clamp_min_(change, -1.0)
        step_by(held.parameters, change, lr, weight_decay, taken)
        if taken is not None:
            keep(there, momenta, taken)


@torch.no_grad()
def observe(
    hessians: list[Tensor], gradients: list[Tensor], *, beta2: float, tokens: float
) -> None:
    """Take the gradients of a mean over so many tokens' drawn labels into h, in place."""
    torch._foreach_mul_(hessians, beta2)
    torch._foreach_addcmul_(hessians, gradients, gradients, value=(1.0 - beta2) * tokens)


@torch.no_grad()
def count_below(momentum: Tensor, hessian: Tensor, *, rho: float) -> Tensor:
    """Elements whose step is smaller than lr, int64 scalar."""
    pairs = zip(*(x.reshape(-1).split(_COUNTED) for x in (momentum, hessian)), strict=True)
    return torch.stack(
        [(m.abs() < h.mul(rho).add_(_EPSILON)).sum() for m, h in pairs]
    ).sum()  # fmt: skip
