"""What a run says: lines on the console of one rank, records in the run folder by another."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.telemetry.console import format_record
from megatron_lite.telemetry.record import Record
from megatron_lite.telemetry.writers import Writers


@dataclass(slots=True)
class Log:
    """Rank 0 says notices and writes records; the last rank prints the training line, as Megatron does."""

    ctx: ParallelContext
    writers: Writers = field(default_factory=lambda: Writers(()))

    def say(self, *lines: str) -> None:
        """Print on rank 0."""
        if self.ctx.rank == 0:
            for line in lines:
                print(line, flush=True)

    def warn(self, *lines: str) -> None:
        """Print on rank 0's stderr."""
        if self.ctx.rank == 0:
            for line in lines:
                print(f"WARNING: {line}", file=sys.stderr, flush=True)

    def write(self, record: Record) -> None:
        """Into metrics.jsonl, TensorBoard and W&B (rank 0)."""
        self.writers.write(record)

    def print(self, record: Record | str) -> None:
        """On the console of the last rank."""
        if self.ctx.rank == self.ctx.world_size - 1:
            print(record if isinstance(record, str) else format_record(record), flush=True)

    def say_of_shard(self, line: str) -> None:
        """Print on dp rank 0 of every model shard: what differs between tp and pp ranks."""
        if self.ctx.dp.rank == 0:
            print(line, flush=True)

    def close(self) -> None:
        """Flush and close every writer."""
        self.writers.close()
