"""GaLore (arXiv:2403.03507): AdamW in the subspace of a matrix's largest singular vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.adam import AdamW
from megatron_lite.optim.stepping import keep, step_by

_LEFT, _RIGHT = "left_basis", "right_basis"


@dataclass(slots=True)
class GaLore:
    """low = L' G; theta = (1 - lr wd) theta - lr scale L adam(low); or with a basis R on the right.

    It holds the singular vectors of the first gradient of each `gap` updates; the moments in it stay
    when it turns, as the authors have it.  No basis on both sides: the gradient that it is made of is
    diagonal there, and Adam makes full steps of the rounding errors beside the diagonal.
    """

    adam: AdamW
    gap: int
    scale: float

    @classmethod
    def from_config(cls, optim: OptimConfig) -> GaLore:
        """As --galore-* and --adam-* say."""
        adam = AdamW(beta1=optim.adam_beta1, beta2=optim.adam_beta2, eps=optim.adam_eps)
        return cls(adam=adam, gap=optim.galore_update_proj_gap, scale=optim.galore_scale)

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
        """One step, in place, of whole matrices; steps: updates done before this one.

        taken: see UpdateRule.
        """
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            if steps % self.gap == 0:
                turn(state, gradient, taken)
            left = state.get(_LEFT)
            low = gradient @ state[_RIGHT] if left is None else left.mT @ gradient
            change = torch.zeros_like(low)
            moments = {name: state[f"low_{name}"] for name in ("exp_avg", "exp_avg_sq")}
            self.adam.update(
                [change], [low], [moments], steps=steps, lr=1.0, weight_decay=0.0, taken=taken
            )
            change = change @ state[_RIGHT].mT if left is None else left @ change
            step_by([parameter], [change.mul_(-self.scale)], lr, weight_decay, taken)


def turn(state: dict[str, Tensor], gradient: Tensor, taken: Tensor | None) -> None:
    """Make the basis that of this gradient; where it is not taken it stays."""
    # what is not finite has no singular vectors, and then nothing is taken
    matrix = gradient if taken is None else gradient.where(taken, 0.0)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)  # waits for the device
    name, vectors = (_LEFT, u) if _LEFT in state else (_RIGHT, vh.mT)
    keep([state[name]], [_signed(vectors[:, : state[name].shape[1]])], taken)


def _signed(vectors: Tensor) -> Tensor:
    """Columns whose largest entry is positive: a library's choice of signs may change with the layout."""
    peak = vectors.abs().argmax(dim=0, keepdim=True)
    return vectors * vectors.gather(0, peak).sign()
