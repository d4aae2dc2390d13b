"""CLEX: how fast rotary frequencies fall as texts grow is learned (arXiv:2310.16450).

    stretch t: a text is t times as long as the model was trained for, t = 1 within that
    log frequencies(t) = log of NTK's with factor 2t - 1  +  u(t)

u solves the equation of kernels/slowing.py, in which `down` starts at zero: CLEX begins as
NTK.  A training step draws a stretch and spreads its samples over positions up to it; in use, the
stretch follows from the length of the text.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_lite.blueprint.figure.parts import Slowing
from megatron_lite.blueprint.rotary import stretch_of
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.kernels.random import key, some_of, uniform
from megatron_lite.kernels.slowing import slowed
from megatron_lite.layers.contexts import ForwardContext, StageContext


class StepStretch(NamedTuple):
    """A training step's: the length of the texts that its samples stand for, and where in them their
    tokens are, int64 [s], ascending."""

    length: int
    positions: Tensor


def step_stretch(context: StageContext, step: int) -> StepStretch | None:
    """Drawn from seed and step, the same for all samples; None where nothing is learned of it."""
    model = context.model
    if context.figure.slowing is None:
        return None
    least = max(2, stretch_of(model, model.seq_length))
    choices = int(model.rope_scaling_factor) - least + 1
    stretch = least + int(uniform(context.seed, step, "stretch") * choices)
    length = stretch * model.rope_original_length
    positions = some_of(length, model.seq_length, key(context.seed, step, "positions"))
    if context.ctx.device.type == "cuda":
        positions = positions.pin_memory()
    return StepStretch(length, positions.to(context.ctx.device, non_blocking=True))


class RotarySlowing(nn.Module):
    """What is learned; one for all stages of a rank, and the same on all ranks of a pipeline.

    A step solves the equation once: gradients of all its layers and micro batches are collected at
    its solution, and finish() carries them on to the weights.
    """

    def __init__(self, context: StageContext, part: Slowing) -> None:
        super().__init__()
        self.part, self.model = part, context.model
        self.up = context.parameter(part.width, part.pairs)
        self.down = context.parameter(part.pairs, part.width)
        self._known: dict[tuple[int, int, int], Tensor] = {}
        self._solved: Tensor | None = None
        self._collected: Tensor | None = None

    def forward(self, stretch: int) -> Tensor:
        """fp64 [r/2]: what frequencies are multiplied by beside NTK's base, 1 within the trained length."""
        up, down = self.up.double(), self.down.double()
        begin, fall = _ntk_logs(self.model, 2 * self.part.pairs, up.device)
        return slowed(up, down, begin, fall, stretch)

    def factors(self, at: ForwardContext) -> Tensor:
        """The same for the texts of a forward, fp64 [r/2], or [b, r/2] where their lengths differ."""
        whole = at.whole
        assert whole is not None, "the length of the whole text must be known"
        if at.training and torch.is_grad_enabled():
            assert isinstance(whole, int), whole
            return self._of_step(stretch_of(self.model, whole))
        if isinstance(whole, int):
            return self._remembered(stretch_of(self.model, whole))
        return torch.stack([self._remembered(stretch_of(self.model, one)) for one in whole])

    def _of_step(self, stretch: int) -> Tensor:
        if self._collected is None:
            self._known.clear()
            self._solved = self(stretch)
            wanted = self._solved.requires_grad
            self._collected = self._solved.detach().requires_grad_(wanted)
        return self._collected

    def _remembered(self, stretch: int) -> Tensor:
        """Solved once for weights as they are: each token of a text asks for it."""
        of = (stretch, self.up._version, self.down._version)
        if of not in self._known:
            with torch.no_grad():
                self._known[of] = self(stretch)
        return self._known[of]

    def finish(self) -> None:
        """All backwards of a step are done: the weights get their gradients, and the next step solves anew."""
        solved, collected = self._solved, self._collected
        self._solved = self._collected = None
        if solved is not None and collected is not None and collected.grad is not None:
            torch.autograd.backward(solved, collected.grad)


def _ntk_logs(model: ModelConfig, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """fp64 [r/2] each: logs of plain frequencies, and what they fall by with ln(2t - 1)."""
    pairs = torch.arange(0, channels, 2, dtype=torch.float64, device=device)
    return pairs * (-math.log(model.rotary_base) / channels), pairs / (2.0 - channels)
