"""What is measured behind an update, on its way to the host while the next step begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_lite.engines.base import Engine, Update
from megatron_lite.train.readback import HostCopy
from megatron_lite.train.second_pass import SecondPass


@dataclass(frozen=True, slots=True)
class Measured:
    """Numbers on their way; statistics: names of those that a step's record has a place for."""

    statistics: Sequence[str]
    metrics: Sequence[str]
    copy: HostCopy

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Statistics, metrics; waits for the device where it has not come so far yet."""
        numbers = self.copy.read()
        end = len(self.statistics)
        return (
            dict(zip(self.statistics, numbers[:end], strict=True)),
            dict(zip(self.metrics, numbers[end:], strict=True)),
        )


def measure_update(update: Update, due: Sequence[SecondPass], engine: Engine) -> Measured | None:
    """What was asked of the update, and what the step's second passes want to know behind it.

    None where that is nothing.  Collective over the world.
    """
    if update.skipped:
        return None
    asked = {"num_zeros": update.num_zeros, "params_norm": update.params_norm}
    statistics = {name: number for name, number in asked.items() if number is not None}
    metrics = {f"{d.name}/{name}": n for d in due for name, n in d.measure(engine).items()}
    if not statistics and not metrics:
        return None
    numbers = [number.double() for number in (*statistics.values(), *metrics.values())]
    return Measured([*statistics], [*metrics], HostCopy(torch.stack(numbers)))
