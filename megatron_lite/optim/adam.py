"""AdamW (arXiv:1711.05101): math only, on lists of tensors; torch's fused kernel where it exists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_lite.optim.rounding import round_into

_MOMENTS = ("exp_avg", "exp_avg_sq")
_WIDENED_ON_CPU, _WIDENED = 1 << 18, 1 << 23
"""Elements whose bf16 moments are fp32 at a time: what stays in a core's cache, or fills a device; on
one 64 MiB beside the state."""


class _Rows(NamedTuple):
    """The same rows of a parameter, its gradient and both moments."""

    parameter: Tensor
    gradient: Tensor
    moments: tuple[Tensor, ...]


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
        members = [
            _Rows(parameter, gradient, tuple(state[name] for name in _MOMENTS))
            for parameter, gradient, state in zip(parameters, gradients, states, strict=True)
        ]
        narrow = [rows for rows in members if _is_narrow(rows)]
        usual = [rows for rows in members if not _is_narrow(rows)]
        self._update(usual, steps, lr, weight_decay, taken)
        for portion in _portions(narrow):
            exact = [r._replace(moments=tuple(m.float() for m in r.moments)) for r in portion]
            self._update(exact, steps, lr, weight_decay, taken)
            for stored, wide in zip(_moments(portion), _moments(exact), strict=True):
                round_into(stored, wide, update=steps)  # the same bits where it is not taken

    def _update(
        self,
        held: Sequence[_Rows],
        steps: int,
        lr: float,
        weight_decay: float,
        taken: Tensor | None,
    ) -> None:
        """The formula, on moments of the parameters' own number format."""
        if not held:
            return
        # a counter of its own per tensor, all from one fill: torch's kernels add one to each
        device = held[0].parameter.device
        count = torch.full((len(held),), float(steps), device=device).unbind()
        adamw(
            [rows.parameter for rows in held], [rows.gradient for rows in held],
            *_moments(held), [], list(count),
            fused=device.type in ("cpu", "cuda"),
            found_inf=None if taken is None else taken.logical_not().float(),
            amsgrad=False, beta1=self.beta1, beta2=self.beta2, lr=lr,
            weight_decay=weight_decay, eps=self.eps, maximize=False,
        )  # fmt: skip


def _moments(held: Sequence[_Rows]) -> tuple[list[Tensor], list[Tensor]]:
    """The first moments, the second ones."""
    return [rows.moments[0] for rows in held], [rows.moments[1] for rows in held]


def _is_narrow(rows: _Rows) -> bool:
    return any(moment.dtype != rows.parameter.dtype for moment in rows.moments)


def _portions(held: Sequence[_Rows]) -> Iterator[list[_Rows]]:
    """The same, cut and put together again: each portion has about as many elements as are widened at once."""
    portion: list[_Rows] = []
    size = 0
    for rows in held:
        limit = _WIDENED_ON_CPU if rows.parameter.device.type == "cpu" else _WIDENED
        for piece in _cut(rows, limit):
            if portion and size + piece.parameter.numel() > limit:
                yield portion
                portion, size = [], 0
            portion.append(piece)
            size += piece.parameter.numel()
    if portion:
        yield portion


def _cut(rows: _Rows, limit: int) -> Iterator[_Rows]:
    """Views of so many rows that their elements are within the limit, of one row at least."""
    size = rows.parameter.numel()
    if size <= limit:
        yield rows
        return
    length = rows.parameter.shape[0]
    at_once = max(1, limit * length // size)
    for first in range(0, length, at_once):
        here = slice(first, first + at_once)
        yield _Rows(rows.parameter[here], rows.gradient[here], tuple(m[here] for m in rows.moments))
