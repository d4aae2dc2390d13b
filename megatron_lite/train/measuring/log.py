"""What a run logs: lines on one rank's console, records that another rank writes to the run folder."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lite.config.errors import StorageError
from megatron_lite.config.sections.telemetry import TelemetryConfig
from megatron_lite.config.streams import outlets
from megatron_lite.parallel.collectives import gather_text
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.storage.disk import Disk, write_atomically
from megatron_lite.telemetry.console import LineForm, format_record
from megatron_lite.telemetry.record import TelemetryRecord
from megatron_lite.telemetry.writers import Writers


@dataclass(slots=True)
class Log:
    """Rank 0 prints notices and writes records; the last rank prints the training line, as Megatron does."""

    ctx: ParallelContext
    form: LineForm = "megatron"
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

    def warn_here(self, *lines: str) -> None:
        """Print on this rank's stderr what no other rank may know."""
        for line in lines:
            print(f"WARNING: rank {self.ctx.rank}: {line}", file=sys.stderr, flush=True)

    def write(self, record: TelemetryRecord) -> None:
        """Into metrics.jsonl, TensorBoard and W&B (rank 0)."""
        self.writers.write(record)

    def print(self, record: TelemetryRecord | str) -> None:
        """On the console of the last rank."""
        if self.ctx.rank == self.ctx.world_size - 1:
            text = record if isinstance(record, str) else format_record(record, self.form)
            print(text, flush=True)

    def say_of_shard(self, line: str) -> None:
        """Print on rank 0, in the order of ranks, a line of the first replica of every model shard.

        What differs between tp and pp ranks.  Collective over the world.
        """
        # never empty: that cannot be sent
        mine = f"{line}\n" if self.ctx.replicas.rank == 0 else "\n"
        lines = gather_text(mine, self.ctx.world, self.ctx.device)
        self.say(*(text.removesuffix("\n") for text in lines if text != "\n"))

    def close(self) -> None:
        """Flush and close every writer."""
        self.writers.close()


def form_of(config: TelemetryConfig) -> LineForm:
    """What --log-format auto means here: a person at a terminal, or a file, a pipe, a parser."""
    if config.log_format != "auto":
        return config.log_format
    return "short" if sys.stdout is not None and sys.stdout.isatty() else "megatron"


@dataclass(slots=True)
class LastResort:
    """Warnings that neither stdout nor stderr takes: errors/output-rank<r>.txt in the run folder."""

    path: Path
    lines: list[str] = field(default_factory=list)

    @classmethod
    def install(cls, folder: Path, rank: int) -> None:
        """From now on for this process's streams."""
        resort = cls(folder / "errors" / f"output-rank{rank}.txt")
        for outlet in outlets():
            outlet.confide(resort.keep)

    def keep(self, line: str) -> None:
        """Write the line; if that fails too, there is nowhere left to report it."""
        self.lines.append(line)
        disk = Disk()
        with contextlib.suppress(StorageError):
            disk.make_folder(self.path.parent)
            write_atomically(self.path, "".join(f"{one}\n" for one in self.lines).encode(), disk)
