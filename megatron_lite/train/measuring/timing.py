"""The timers of a run: which spans there are, from which --timing-log-level, and over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType

import torch

from megatron_lite.blueprint.schedules.actions import Action
from megatron_lite.blueprint.timeline import COMPUTE, HOST_SPAN, OPTIMIZER, WAIT, WEIGHTS
from megatron_lite.parallel.collectives import all_gather
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.telemetry.recorder import Recorder
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
        HOST_SPAN: 2,
        "save-checkpoint": 1,
        "send-wait": 3,
        "weight-gradient": 3,
    }
)
"""Span -> the --timing-log-level that measures it, in the order of printing; Megatron's names.

Sends are posted early and hardly waited for.  Likewise all-grads-sync is only the wait for what the
overlap with the backward has left.  No --timing-log-level shows level 3: only a timeline has it."""

SPAN_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "batch-generator": WAIT,
        "forward-recv": WAIT,
        "backward-recv": WAIT,
        "send-wait": WAIT,
        "all-grads-sync": WAIT,
        "optimizer": OPTIMIZER,
        "weight-gradient": WEIGHTS,
    }
)
"""Span -> its kind on a timeline; computes have the kind of their action, others are not shown."""


def _wait_for_stream() -> None:
    """For what is computed; not for receives posted early and reductions in flight on other streams."""
    torch.cuda.current_stream().synchronize()


class RunTimers:
    """Spans by name; gather() brings them together from all ranks.

    recorder: keeps them one by one, with the action they belong to, while it is recording.
    """

    def __init__(
        self, level: int, device: torch.device | None = None, recorder: Recorder | None = None
    ) -> None:
        on_gpu = device is not None and device.type == "cuda"
        self.level = level
        self._timers = Timers(level, wait=_wait_for_stream if on_gpu else no_wait)
        self._paused = False
        self.recorder = recorder or Recorder()
        self._chunks: dict[int, int] = {}  # stage -> which of this rank's it is, in order of use

    def span(self, name: str, action: Action | None = None) -> AbstractContextManager[None]:
        """Measure the block, if --timing-log-level asks for this name of LEVELS; record it if asked."""
        if self._paused:
            return nullcontext()
        if self.recorder.recording:
            return self._recorded(name, action)
        return self._timers.span(name, level=LEVELS[name])

    @contextmanager
    def _recorded(self, name: str, action: Action | None) -> Iterator[None]:
        computes = name.endswith("-compute") and action is not None
        kind = action.op.value if computes and action is not None else SPAN_KINDS.get(name)
        with self._timers.span(name, level=LEVELS[name]):
            if kind is None:
                yield
                return
            what = str(action) if computes else f"{name} {action}" if action else name
            chunk = 0 if action is None else self._chunk(action.stage)
            with self.recorder.span(COMPUTE, kind, what, chunk=chunk):
                yield

    def _chunk(self, stage: int) -> int:
        return self._chunks.setdefault(stage, len(self._chunks))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Measure nothing in the block: an evaluation is no part of a training step."""
        recording, self.recorder.recording = self.recorder.recording, False
        self._paused = True
        try:
            yield
        finally:
            self._paused, self.recorder.recording = False, recording

    def gather(self, ctx: ParallelContext) -> list[dict[str, float]]:
        """Per rank, the seconds of every span since the last call.  Collective over the world."""
        mine = self._timers.take()
        row = torch.tensor([mine.get(name, -1.0) for name in LEVELS], dtype=torch.float64)
        rows = all_gather(row.to(ctx.device), ctx.world).view(ctx.world_size, len(LEVELS))
        return [
            {name: seconds for name, seconds in zip(LEVELS, times, strict=True) if seconds >= 0.0}
            for times in rows.tolist()
        ]
