"""In how many chunks of tokens the head and the loss are computed: by the memory their logits may take.

Chunks cost: their products are smaller (4 to 8 of them 6 to 12 % of head and loss, 64 of them 57 %:
pytorch#124480), and the head's weight gradient is summed in a buffer of its own, 4 bytes per weight.
So: none while the logits of a micro batch fit, then few.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lite.config.pipeline import SPLIT_BACKWARD
from megatron_lite.config.sections.parallel import ParallelConfig


@dataclass(frozen=True, slots=True)
class LogitsBudget:
    """chunk_bytes: what the logits of a chunk may take; most: chunks that are worth it, None for any."""

    chunk_bytes: float = 2.0**30
    most: int | None = 8

    @classmethod
    def from_config(cls, parallel: ParallelConfig, schedule: str) -> LogitsBudget:
        """--logits-chunk-mib, else the default.

        Under a schedule of zero bubble that is one chunk: its weight gradient waits for the W that
        fills a bubble, and what waits keeps its logits.  In chunks it is made in F, and a simulated
        step of 1.3B to 8B models on 4 and 8 stages takes 0.1 to 1.9 % longer.
        """
        if parallel.logits_chunk_mib is not None:
            return cls(parallel.logits_chunk_mib * 2.0**20, None)
        return cls(most=1) if schedule in SPLIT_BACKWARD else cls()

    def chunks(self, length: int, bytes_per_position: float) -> int:
        """Chunks of a micro batch of so many positions; a power of two, which divides usual lengths."""
        needed = max(math.ceil(length * bytes_per_position / self.chunk_bytes), 1)
        number = min(1 << (needed - 1).bit_length(), length)
        return number if self.most is None else min(number, self.most)
