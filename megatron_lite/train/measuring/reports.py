"""Measurements of all ranks, gathered: own time per step, peak memory."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch

from megatron_lite.checkpoint.progress import Progress
from megatron_lite.config.sections.telemetry import TelemetryConfig
from megatron_lite.parallel.collectives import all_gather
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.telemetry.ranks import ranks_record, slow_ranks
from megatron_lite.telemetry.record import RanksRecord
from megatron_lite.train.measuring.waits import Waits


@dataclass(slots=True)
class OwnTime:
    """Wall time of steps without the waits for other ranks; begin() and end() enclose a step.

    The first step of a process is left out: it loads libraries and connects.
    """

    ctx: ParallelContext
    waits: Waits
    seconds: float = 0.0
    steps: int = -1
    _slow: frozenset[str] = frozenset()
    _told: frozenset[str] = frozenset()

    def begin(self) -> None:
        """Waits until now belong to no step."""
        self.waits.take()

    def mark(self) -> float:
        """All that belongs to a step has been enqueued: for end(), when it is heard."""
        return self.waits.mark()

    def end(self, wall_seconds: float, until: float | None = None) -> None:
        """A step took so long in all; until: where it ended, if others have begun since."""
        own = wall_seconds - self.waits.take(until)
        self.seconds = self.seconds + own if self.steps >= 0 else 0.0
        self.steps += 1

    def report(self, progress: Progress, config: TelemetryConfig) -> RanksRecord | None:
        """Mean own time per step of every rank since the last report; None where there is no step.

        Collective over the world.
        """
        if self.steps == 0:
            return None
        mean, self.seconds, self.steps = self.seconds / self.steps, 0.0, 0
        return ranks_record(
            "own time",
            _gathered(mean, self.ctx),
            iteration=progress.step,
            samples=progress.samples,
            count=config.straggler_minmax_count,
        )

    def stays_slow(self, record: RanksRecord | None) -> bool:
        """Whether a rank stands out in this report as in the one before, and was not reported yet."""
        if record is None:
            return False
        slow = frozenset(slow_ranks(record))
        lasting, self._slow = slow & self._slow, slow
        news, self._told = lasting - self._told, lasting
        return bool(news)


def memory_report(ctx: ParallelContext, progress: Progress, count: int) -> RanksRecord:
    """Most memory of every rank so far: of the device, or of the process.  Collective over the world."""
    return ranks_record(
        "memory",
        _gathered(float(peak_bytes(ctx.device)), ctx),
        iteration=progress.step,
        samples=progress.samples,
        count=count,
    )


def peak_bytes(device: torch.device) -> int:
    """Most bytes held at once: allocated on the GPU, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _gathered(value: float, ctx: ParallelContext) -> list[float]:
    mine = torch.tensor([value], dtype=torch.float64, device=ctx.device)
    return [float(v) for v in all_gather(mine, ctx.world).tolist()]
