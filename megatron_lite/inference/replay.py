"""Decode steps on a GPU are recorded once and replayed: the host starts one graph in place of every kernel.

A graph sees a number of the cache's slots, a power of two: a text that grows meets few of them.
What cannot be recorded runs kernel by kernel, which is told once and costs speed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite.inference.cache import KeyValueCache
from megatron_lite.inference.fixed import FixedStep
from megatron_lite.kernels.compiled import warn_on_stderr
from megatron_lite.models.decoder import Decoder

RecordStep = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""What a function of tensors does is recorded; the result does it again, into the same tensor."""

LEAST_SLOTS = 256
"""So many keys are read beside the weights within the time of a launch."""


class CudaGraphs:
    """Records on a GPU; all graphs share a pool of memory, since no two run at once."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """run is called before, too: libraries set themselves up at the first call."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # other threads of the process (a server's) may go on meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()

        def again() -> Tensor:
            graph.replay()
            return result

        return again


def recorder(model: Decoder) -> RecordStep | None:
    """How decode steps of this model are recorded where it lies; None: they are not."""
    ctx = model.context.ctx
    alone = ctx.tp.size == ctx.pp.size == 1  # ranks wait for one another, which no graph does
    return CudaGraphs() if alone and ctx.device.type == "cuda" else None


@dataclass(slots=True)
class _Recorded:
    step: FixedStep
    graphs: dict[int, Callable[[], Tensor]]


class ReplayedDecode:
    """Decode steps of a cache's rows, recorded when one first sees so many slots.

    recorded: graphs so far; warn: told, once, that recording failed.
    """

    def __init__(
        self, model: Decoder, cache: KeyValueCache, record: RecordStep,
        warn: Callable[[str], None] = warn_on_stderr,
    ) -> None:  # fmt: skip
        self._model, self._cache, self._record, self._warn = model, cache, record, warn
        self._made: _Recorded | None = None
        self._capacity = cache.capacity
        self.recorded, self.failed = 0, False

    def forward(self, new: Sequence[Sequence[int]]) -> Tensor | None:
        """fp32 logits [b, v] after each row's next token, which the next call overwrites.

        None: it is no step of one token a row, or cannot be recorded; nothing has happened then.
        """
        if self.failed or not self._cache.is_allocated or max(map(len, new)) > 1:
            return None
        if self._made is None or self._capacity != self._cache.capacity:
            self._made = _Recorded(FixedStep(self._model, self._cache), {})
            self._capacity = self._cache.capacity
        made, cache = self._made, self._cache
        most = max(n + len(row) for n, row in zip(cache.lengths, new, strict=True))
        slots = slots_for(most, cache.capacity)
        try:
            made.step.take(new)
            if slots not in made.graphs:
                made.graphs[slots] = self._record(lambda: made.step.logits(slots))
                self.recorded += 1
            logits = made.graphs[slots]()
        except Exception as error:  # whatever it is, the same step without a graph works or says so
            self.failed, self._made = True, None
            said = str(error).strip().splitlines() or ["no reason given"]
            self._warn(
                f"decode steps cannot be recorded ({type(error).__name__}: {said[0]}): they run kernel by "
                "kernel, which costs speed alone"
            )
            return None
        cache.advance([len(row) for row in new])
        return logits


def slots_for(tokens: int, capacity: int) -> int:
    """The least power of two of slots, from LEAST_SLOTS on, that so many tokens fit in; at most all."""
    slots = LEAST_SLOTS
    while slots < tokens:
        slots *= 2
    return min(slots, capacity)
