"""The timers of a run: which spans there are, from which --timing-log-level, and over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType

import torch

from megatron_lite.parallel.collectives import all_gather
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.telemetry.timers import Timers, no_wait

LEVELS: Mapping[str, int] = MappingProxyType(
    {
        "model-and-optimizer-setup": 0,
        "load-checkpoint": 0,
        "train/valid/test-data-iterators-setup": 0,
        "batch-generator": 1,
        "forward-backward": 1,
        "forward-compute": 2,
        "forward-recv": 2,
        "backward-compute": 2,
        "backward-recv": 2,
        "optimizer": 1,
        "all-grads-sync": 1,
        "optimizer-count-zeros": 2,
        "optimizer-clip-main-grad": 2,
        "optimizer-inner-step": 2,
        "save-checkpoint": 1,
    }
)
"""Span -> the --timing-log-level that measures it, in the order of printing; Megatron's names.

Sends have no span of their own: they are posted early and nobody waits for them.  Likewise
all-grads-sync is only the wait for what the overlap with the backward has left."""


class RunTimers:
    """Spans by name; gather() brings them together from all ranks."""

    def __init__(self, level: int, device: torch.device | None = None) -> None:
        on_gpu = device is not None and device.type == "cuda"
        self.level = level
        self._timers = Timers(level, wait=torch.cuda.synchronize if on_gpu else no_wait)
        self._paused = False

    def span(self, name: str) -> AbstractContextManager[None]:
        """Measure the block, if --timing-log-level asks for this name of LEVELS."""
        return nullcontext() if self._paused else self._timers.span(name, level=LEVELS[name])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Measure nothing in the block: an evaluation is no part of a training step."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def gather(self, ctx: ParallelContext) -> list[dict[str, float]]:
        """Per rank, the seconds of every span since the last call.  Collective over the world."""
        mine = self._timers.take()
        row = torch.tensor([mine.get(name, -1.0) for name in LEVELS], dtype=torch.float64)
        rows = all_gather(row.to(ctx.device), ctx.world).view(ctx.world_size, len(LEVELS))
        return [
            {name: seconds for name, seconds in zip(LEVELS, times, strict=True) if seconds >= 0.0}
            for times in rows.tolist()
        ]
