"""AdamW whose moments are kept in 8 bits, block by block of a row (arXiv:2110.02861)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.optim.adam import AdamW
from megatron_lite.optim.portions import Columns, Slab, portions, slabs
from megatron_lite.optim.stepping import keep

FIRST, SECOND = ("exp_avg_8bit", "exp_avg_scale"), ("exp_avg_sq_8bit", "exp_avg_sq_scale")
"""A moment's codes, and the largest value of each block."""
_LEAST = 1e-12
"""Of a block's largest value, by which it is divided."""


@dataclass(slots=True)
class AdamW8bit:
    """AdamW's formula in the parameters' format, on moments that are wide for a portion at a time.

    A moment is a code for each element, of the 256 numbers of dynamic_map, times the largest value of
    its block: so many neighbours in a row of the whole matrix.  Which block an element belongs to
    depends on no layout, since ranks have whole blocks (blueprint/optimizers.py).
    """

    beta1: float
    beta2: float
    eps: float
    block: int
    _maps: dict[tuple[torch.device, bool], Tensor] = field(default_factory=dict)

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
        """One step, in place, of matrices; as AdamW.update, which sees the moments in full."""
        formula = AdamW(self.beta1, self.beta2, self.eps)
        for portion in portions(slabs(parameters, gradients, states, (*FIRST, *SECOND))):
            wide = [self._widened(rows) for rows in portion]
            first, second = ([moments[k] for moments in wide] for k in (0, 1))
            held = Columns(
                [rows.parameter for rows in portion], [rows.gradient for rows in portion],
                (first, second),
            )  # fmt: skip
            formula.step(held, steps=steps, lr=lr, weight_decay=weight_decay, taken=taken)
            for rows, moments in zip(portion, wide, strict=True):
                self._store(rows, moments, taken)

    def _widened(self, rows: Slab) -> tuple[Tensor, Tensor]:
        codes, scale, codes_sq, scale_sq = rows.states
        return (
            decode(codes, scale, self._map(codes, signed=True), self.block),
            decode(codes_sq, scale_sq, self._map(codes, signed=False), self.block),
        )

    def _store(self, rows: Slab, moments: tuple[Tensor, Tensor], taken: Tensor | None) -> None:
        for moment, stored, signed in zip(
            moments, (rows.states[:2], rows.states[2:]), (True, False), strict=True
        ):
            keep(stored, encode(moment, self._map(moment, signed=signed), self.block), taken)

    def _map(self, like: Tensor, *, signed: bool) -> Tensor:
        key = like.device, signed
        if key not in self._maps:
            self._maps[key] = torch.tensor(dynamic_map(signed=signed), device=like.device)
        return self._maps[key]


def dynamic_map(*, signed: bool) -> list[float]:
    """256 numbers of at most 1, in order: seven decades, each with twice the steps of the one below.

    In a decade they are the middles of equal parts of it.  Signed ones are those of half as many
    parts, with both signs; 0 and 1 complete them.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        parts = 2 ** (decade if signed else decade + 1)
        for k in range(parts):
            middle = (0.1 + 0.9 * (k + 0.5) / parts) * 10.0 ** (decade - 6)
            found += [middle, -middle] if signed else [middle]
    return sorted(found)


def encode(exact: Tensor, numbers: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """exact: [r, c] -> codes: uint8 [r, c] of the nearest numbers, scale: [r, c / block] (rounded up)."""
    rows, columns = exact.shape
    blocks = F.pad(exact, (0, -columns % block)).view(rows, -1, block)
    scale = blocks.abs().amax(2)
    relative = blocks / scale.clamp(min=_LEAST).unsqueeze(2)
    between = (numbers[1:] + numbers[:-1]) / 2
    codes = torch.bucketize(relative, between.to(exact.dtype), right=True, out_int32=True)
    return codes.view(rows, -1)[:, :columns].to(torch.uint8), scale


def decode(codes: Tensor, scale: Tensor, numbers: Tensor, block: int) -> Tensor:
    """The other way: [r, c], in the scale's format."""
    rows, columns = codes.shape
    values = numbers.to(scale.dtype).index_select(0, codes.reshape(-1).int())
    blocks = F.pad(values.view(rows, columns), (0, -columns % block)).view(rows, -1, block)
    return (blocks * scale.unsqueeze(2)).view(rows, -1)[:, :columns].contiguous()
