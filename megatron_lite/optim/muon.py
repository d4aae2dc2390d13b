"""Muon (kellerjordan.github.io/posts/muon): momentum made orthogonal by Newton-Schulz iterations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, cycle, islice, repeat
from typing import Literal

import torch
from torch import Tensor

from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.stepping import keep, step_by

Triple = tuple[float, float, float]

_ENDLESS: dict[str, tuple[Triple, ...]] = {
    "simple": ((3.4445, -4.7750, 2.0315),),
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "aol": (
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    ),
}
"""Coefficients that begin anew after the last; simple is Keller Jordan's own."""

_SETTLING: dict[str, tuple[Triple, ...]] = {
    "polar_express": (  # arXiv:2505.16932, with its margin of 1.01
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ),
    "cans": (  # arXiv:2506.10935
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
}
"""Coefficients whose last repeats."""

_LEAST_NORM = 1e-7
"""A gradient of zeros stays zeros."""


def coefficients(kind: str, steps: int) -> tuple[Triple, ...]:
    """(a, b, c) of each iteration, by the names that Megatron-LM gives them."""
    if kind in _SETTLING:
        rows = _SETTLING[kind]
        return tuple(islice(chain(rows, repeat(rows[-1])), steps))
    return tuple(islice(cycle(_ENDLESS[kind]), steps))


def scale(mode: str, rows: int, columns: int) -> float:
    """What an orthogonal update of this shape is multiplied with."""
    if mode == "spectral":  # arXiv:2502.16982; 0.2 of it is about AdamW's size
        return float(max(rows, columns)) ** 0.5
    if mode == "unit_rms_norm":  # jeremybernste.in/writing/deriving-muon
        return (rows / columns) ** 0.5
    return max(1.0, rows / columns) ** 0.5  # shape_scaling: Keller Jordan's


def orthogonal(
    matrix: Tensor, steps: Sequence[Triple], precision: Literal["medium", "high", "highest"]
) -> Tensor:
    """Singular values of the matrix brought to about 1 by X <- aX + (bXX' + c(XX')^2)X, a triple for each step.

    precision: of the products: bf16, TF32 where the device has it, or that of the matrix.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix  # the smaller gram matrix
    if precision == "medium":
        x = x.bfloat16()
    x = x / x.norm().clamp_min(_LEAST_NORM)
    with _products_in_tf32(precision == "high" and x.is_cuda):
        for a, b, c in steps:
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)


@contextmanager
def _products_in_tf32(wanted: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@dataclass(slots=True)
class Muon:
    """m = mu m + (1 - mu) g; theta -= lr (wd theta + scale orthogonal(m, or with Nesterov mu m + (1 - mu) g)).

    Of whole matrices, one by one: q, k and v, gate and up are matrices of their own.
    """

    momentum: float
    nesterov: bool
    steps: tuple[Triple, ...]
    precision: Literal["medium", "high", "highest"]
    scale_mode: str
    extra_scale: float

    @classmethod
    def from_config(cls, optim: OptimConfig) -> Muon:
        """As --muon-* say."""
        return cls(
            momentum=optim.muon_momentum,
            nesterov=optim.muon_nesterov,
            steps=coefficients(optim.muon_coefficient_type, optim.muon_num_ns_steps),
            precision=optim.muon_fp32_matmul_prec,
            scale_mode=optim.muon_scale_mode,
            extra_scale=optim.muon_extra_scale_factor,
        )

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
        """One step, in place, of whole matrices; steps: updates done before this one (unused).

        taken: see UpdateRule.
        """
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            mean = state["momentum"].lerp(gradient, 1.0 - self.momentum)
            ahead = gradient.lerp(mean, self.momentum) if self.nesterov else mean
            keep([state["momentum"]], [mean], taken)
            change = orthogonal(ahead, self.steps, self.precision)
            change *= self.extra_scale * scale(self.scale_mode, *parameter.shape)
            step_by([parameter], [change], lr, weight_decay, taken)
