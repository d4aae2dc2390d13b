"""Adafactor (arXiv:1804.04235): a second moment of a matrix from the means of its rows and columns."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.relative_step import relative_step
from megatron_lite.optim.shares import TpShare, TpShares
from megatron_lite.optim.stepping import keep

FULL, ROWS, COLUMNS = "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"
"""States, under transformers' names."""


class _Member(NamedTuple):
    """A tensor to update, or what this tp rank has of it."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    share: TpShare


class _Second(NamedTuple):
    """The second moment after this step: its new states, and what a gradient is multiplied by."""

    states: dict[str, Tensor]
    factors: tuple[Tensor, ...]

    def scale(self, gradient: Tensor) -> Tensor:
        """g / sqrt(V)."""
        first, *others = self.factors
        scaled = gradient * first
        for factor in others:
            scaled.mul_(factor)
        return scaled


class _Step(NamedTuple):
    """What all members of an update share; new: 1 - beta2, what the new squares weigh."""

    new: float
    rate: float
    weight_decay: float
    taken: Tensor | None


_Sums = Generator[list[Tensor], None, None]
"""An update that stops where it needs what other ranks have: at tensors that become totals."""


@dataclass(frozen=True, slots=True)
class Adafactor:
    """theta -= a u / max(1, RMS(u) / clip_threshold), u = g / sqrt(V), V = R C / mean(R) of a matrix.

    R and C are means of g^2 + eps1 over columns and rows, with beta2 = 1 - t^decay_rate, so that they
    need no correction; a vector has all of V (algorithms 4 and 5 of the paper).  a is the learning
    rate, or rho of the relative step; times max(eps2, RMS(theta)) with scale_parameter (algorithm 6).
    Decay is decoupled, of the scaled rate; beta1 is a mean of the scaled updates.
    """

    decay_rate: float
    eps1: float
    eps2: float
    clip_threshold: float
    beta1: float | None
    scale_parameter: bool
    relative_step: bool
    warmup_init: bool

    @classmethod
    def from_config(cls, optim: OptimConfig) -> Adafactor:
        """As --adafactor-* say."""
        return cls(
            decay_rate=optim.adafactor_decay_rate,
            eps1=optim.adafactor_eps1,
            eps2=optim.adafactor_eps2,
            clip_threshold=optim.adafactor_clip_threshold,
            beta1=optim.adafactor_beta1,
            scale_parameter=optim.adafactor_scale_parameter,
            relative_step=optim.adafactor_relative_step,
            warmup_init=optim.adafactor_warmup_init,
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
        shares: TpShares | None = None,
    ) -> None:
        """One step, in place, of matrices and vectors; two sums over tp for all members together.

        lr: a factor on the relative step where there is one.  taken, shares: see UpdateRule.
        """
        shares = shares or TpShares([TpShare(tuple(p.shape)) for p in parameters])
        rho = relative_step(steps, warmup_init=self.warmup_init) if self.relative_step else 1.0
        step = _Step((steps + 1) ** self.decay_rate, lr * rho, weight_decay, taken)
        waiting: list[_Sums] = []
        for member in map(_Member, parameters, gradients, states, shares.of):
            walk = self._walk(member, step)
            if member.share.cut is None:
                deque(walk, maxlen=0)  # its sums are totals
            else:
                waiting.append(walk)
        while waiting:
            found = [next(walk, None) for walk in waiting]
            if found[0] is None:
                return
            sums = [tensor for partial in found for tensor in partial or ()]
            if sums:
                shares.total(sums)

    def _walk(self, member: _Member, step: _Step) -> _Sums:
        """The update of one member, in two places waiting for totals."""
        parameter, share = member.parameter, member.share
        numel = math.prod(share.shape)
        squares = [parameter.square().sum()] if self.scale_parameter else []
        second = yield from self._second(member, step.new, squares)
        change = second.scale(member.gradient)
        total = change.square().sum()
        if share.cut is not None:
            del change  # all members wait together: one tensor of their size at a time
        yield [total]
        if share.cut is not None:
            change = second.scale(member.gradient)
        rate: float | Tensor = step.rate
        if squares:
            rate = (squares[0] / numel).sqrt().clamp(min=self.eps2) * step.rate
        change.mul_(rate / ((total / numel).sqrt() / self.clip_threshold).clamp(min=1.0))
        states = dict(second.states)
        if self.beta1 is not None:
            change = states["exp_avg"] = member.state["exp_avg"].lerp(change, 1.0 - self.beta1)
        if step.weight_decay:
            change = change + parameter * (step.weight_decay * rate)
        if step.taken is not None:
            change = change.where(step.taken, 0.0)
        keep([member.state[name] for name in states], [*states.values()], step.taken)
        parameter.sub_(change)

    def _second(
        self, member: _Member, new: float, also: list[Tensor]
    ) -> Generator[list[Tensor], None, _Second]:
        """Its second moment; also: sums for which to wait with its own."""
        squares = member.gradient.square().add_(self.eps1)
        state, (shape, cut) = member.state, member.share
        if len(shape) < 2:
            yield also
            whole = state[FULL].lerp(squares, new)
            return _Second({FULL: whole}, (whole.rsqrt(),))
        rows, columns = squares.sum(1), squares.sum(0)
        del squares
        if cut == 1:
            yield [rows, *also]
        row = state[ROWS].lerp(rows / shape[1], new)
        total = row.sum()
        if cut == 0:
            yield [columns, total, *also]
        if cut is None:
            yield also
        column = state[COLUMNS].lerp(columns / shape[0], new)
        factors = (row / (total / shape[0])).rsqrt().unsqueeze(1), column.rsqrt()
        return _Second({ROWS: row, COLUMNS: column}, factors)
