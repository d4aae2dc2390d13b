"""Lion (arXiv:2302.06675, program 1): the sign of a mean of gradient and momentum, each element by as much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.optim.portions import Columns, portions, slabs, widened
from megatron_lite.optim.stepping import keep, step_by


@dataclass(slots=True)
class Lion:
    """theta -= lr (sign(beta1 m + (1 - beta1) g) + wd theta); m = beta2 m + (1 - beta2) g."""

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
        taken: Tensor | None = None,
    ) -> None:
        """One step, in place, of tensors of any shapes; steps: updates done before this one.

        taken: see UpdateRule.
        """
        for portion in portions(slabs(parameters, gradients, states, ("exp_avg",))):
            with widened(portion, update=steps) as held:
                self._update(held, lr, weight_decay, taken)

    def _update(self, held: Columns, lr: float, weight_decay: float, taken: Tensor | None) -> None:
        (momenta,) = held.states
        change = torch._foreach_lerp(momenta, held.gradients, 1.0 - self.beta1)
        torch._foreach_sign_(change)
        step_by(held.parameters, change, lr, weight_decay, taken)
        if taken is None:
            torch._foreach_lerp_(momenta, held.gradients, 1.0 - self.beta2)
            return
        new = torch._foreach_lerp(momenta, held.gradients, 1.0 - self.beta2)
        keep(momenta, new, taken)
