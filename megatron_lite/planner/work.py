"""Seconds of work by kind: of an action, of a layer's passes, or measured on a pipeline rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_lite.blueprint.schedules.actions import Op


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds by kind; `tp` is what of the collectives is exposed, `tp_hidden` what runs under products.

    launches: kernels that the host starts, and what it does besides in as many times of one;
    host: what the device waits for them.
    """

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tp: float = 0.0
    tp_hidden: float = 0.0
    launches: float = 0.0
    host: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.products + self.attention + self.elementwise + self.tp + self.host

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.elementwise + other.elementwise,
            self.tp + other.tp,
            self.tp_hidden + other.tp_hidden,
            self.launches + other.launches,
            self.host + other.host,
        )

    def __mul__(self, times: float) -> Work:
        return Work(
            self.products * times,
            self.attention * times,
            self.elementwise * times,
            self.tp * times,
            self.tp_hidden * times,
            self.launches * times,
            self.host * times,
        )


@dataclass(frozen=True, slots=True)
class Passes:
    """One layer's or the head's work in forward, backward for the input, and for the weights.

    exposed: of the collectives of I where the backward is split; gathered: what W gathers then.
    """

    forward: Work
    inputs: Work
    weights: Work
    exposed: float = 0.0
    gathered: float = 0.0

    def split(self) -> tuple[Work, Work]:
        """I (dgrad) and W (wgrad) as actions of their own."""
        hidden = min(self.gathered, self.weights.products)
        return (
            replace(self.inputs, tp=self.exposed, tp_hidden=0.0),
            replace(self.weights, tp=self.gathered - hidden, tp_hidden=hidden),
        )


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Measured seconds of one micro batch on a pipeline rank, and of a message between two.

    They take the place of the predicted ones; a rank's chunks share them evenly.
    """

    forward: float
    inputs: float
    """Backward for the input alone (T_B of arXiv:2401.10241)."""
    weights: float
    """Backward for the weights alone (T_W)."""
    message: float

    def work(self, op: Op, chunks: int) -> Work:
        """One action of one of a rank's chunks."""
        seconds = {
            Op.F: self.forward,
            Op.I: self.inputs,
            Op.W: self.weights,
            Op.B: self.inputs + self.weights,
        }
        return Work(products=seconds[op] / chunks)
