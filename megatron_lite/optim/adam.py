"""AdamW (arXiv:1711.05101): math only, on lists of tensors; torch's fused kernel where it exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_lite.optim.portions import Columns, columns, portions, slabs, widened

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class AdamW:
    """theta -= lr (wd theta + m^ / (sqrt(v^) + eps)) with bias-corrected moments m^ and v^.

    States are named tensors beside each parameter (blueprint/optimizers.py); a rule sees real rows
    or real matrices.  Moments in bf16 are computed with in fp32 and rounded (rounding.py).
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
        taken: Tensor | None = None,
    ) -> None:
        """One step, in place, of tensors of any shapes with gradients and moments of the same.

        steps: updates done before this one, for the bias correction; lr and weight_decay: this step's.
        taken: see UpdateRule; the kernels read it as what they know for a loss scale's overflow.
        """
        members = slabs(parameters, gradients, states, _MOMENTS)
        usual = [rows for rows in members if not rows.is_narrow]
        if usual:
            self.step(columns(usual), steps=steps, lr=lr, weight_decay=weight_decay, taken=taken)
        for portion in portions([rows for rows in members if rows.is_narrow]):
            with widened(portion, update=steps) as held:
                self.step(held, steps=steps, lr=lr, weight_decay=weight_decay, taken=taken)

    def step(
        self, held: Columns, *, steps: int, lr: float, weight_decay: float, taken: Tensor | None
    ) -> None:
        """The formula, on moments of the parameters' own number format."""
        # a counter of its own per tensor, all from one fill: torch's kernels add one to each
        device, number = held.parameters[0].device, len(held.parameters)
        first, second = held.states
        count = torch.full((number,), float(steps), device=device).unbind()
        adamw(
            held.parameters, held.gradients, first, second, [], list(count),
            fused=device.type in ("cpu", "cuda"),
            found_inf=None if taken is None else taken.logical_not().float(),
            amsgrad=False, beta1=self.beta1, beta2=self.beta2, lr=lr,
            weight_decay=weight_decay, eps=self.eps, maximize=False,
        )  # fmt: skip
