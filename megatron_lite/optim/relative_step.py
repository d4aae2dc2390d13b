"""Adafactor's own step (arXiv:1804.04235, section 9); no torch, so that a plan may draw its curve."""

from __future__ import annotations

import math

from megatron_lite.config.sections.optim import OptimConfig


def step_factor(optim: OptimConfig, steps: int) -> float:
    """What the learning rate is multiplied by in the update after so many: 1 but for a relative step."""
    if not optim.adafactor_relative_step:
        return 1.0
    return relative_step(steps, warmup_init=optim.adafactor_warmup_init)


def relative_step(steps: int, *, warmup_init: bool) -> float:
    """rho of the update after so many: 1 / sqrt(t), at most 1e-2, or 1e-6 t with a warm-up."""
    t = steps + 1
    return min(1e-6 * t if warmup_init else 1e-2, 1.0 / math.sqrt(t))
