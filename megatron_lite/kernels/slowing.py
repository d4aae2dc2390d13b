"""The differential equation of CLEX (arXiv:2310.16450), by Runge and Kutta's method of fourth order.

    z(t) = log of the frequencies at stretch t = log of NTK's(t) + u(t),    u(1) = 0
    du/dt = down · silu(up · (z(t) + log of NTK's(t)))

That NTK's own part of dz/dt needs no solving makes CLEX exactly NTK where `down` is zero.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 32
"""From one stretch to the next: exact to 1e-7."""


def slowed(up: Tensor, down: Tensor, begin: Tensor, fall: Tensor, stretch: int) -> Tensor:
    """fp64 [r/2]: exp(u), by which NTK's frequencies at a stretch are multiplied; all ones at 1.

    up: [width, r/2], down [r/2, width]; the log of NTK's frequencies is begin + fall ln(2t - 1), [r/2]
    each.  All in fp64.
    """
    at_begin, falling = up @ (2.0 * begin), up @ (2.0 * fall)
    u, h = torch.zeros_like(begin), 1.0 / STEPS

    def slope(t: float, u: Tensor) -> Tensor:
        hidden = at_begin + falling * math.log(2.0 * t - 1.0) + up @ u
        return down @ F.silu(hidden)

    for n in range((stretch - 1) * STEPS):
        t = 1.0 + n * h
        first = slope(t, u)
        second = slope(t + h / 2, u + first * (h / 2))
        third = slope(t + h / 2, u + second * (h / 2))
        last = slope(t + h, u + third * h)
        u = u + (first + 2.0 * (second + third) + last) * (h / 6)
    return u.exp()
