"""Whether token files can be written: their names at the start, the free space after the first batch."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_lite.config.errors import ConfigError, StorageError
from megatron_lite.data.preparing.encode import EncodedBatch, Job
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.outputs import check_outputs, check_prefix, pair_paths

SURELY = 1.25  # the first batch may be denser than the rest: beyond this times the room is an error
PER_SEQUENCE, PER_DOCUMENT = 16, 16  # bytes in the index and what it is made from

_log = logging.getLogger(__name__)


def check_pairs(job: Job, prefix: str, disk: Disk) -> None:
    """The pairs of a job may be written under this --output-prefix; nothing was read yet."""
    check_prefix("--output-prefix", prefix)
    for key in job.keys:
        if "/" in key:
            raise ConfigError(
                f"--json-keys {key} would be a folder in the files' names - take its text by "
                f"--template '{{{key}}}', and name the files by --json-keys {key.replace('/', '_')}"
            )
    paths = [path for pair in job.pairs(prefix) for path in pair_paths(pair)]
    check_outputs("--output-prefix", paths, disk)


def require_room_for_rest(first: EncodedBatch, left: int, folder: Path, disk: Disk) -> None:
    """StorageError where `left` more bytes of input, dense as the first, will surely not fit."""
    read = first.batch.read
    if not read:
        return
    written = sum(
        batch.tokens.nbytes
        + PER_SEQUENCE * len(batch.lengths)
        + PER_DOCUMENT * len(batch.sequences)
        for batch in first.tokens
    )
    needed, free = written * (read + left) // read, disk.free_bytes(folder)
    if needed > SURELY * free:
        raise StorageError(
            f"--output-prefix: {folder} has {free} bytes free, but the first {read} of "
            f"{read + left} bytes of input gave {written} bytes, all will give about {needed} - "
            "free some space or choose another folder"
        )
    if needed > free:
        _log.warning("note: %s has %d bytes free, about %d will be needed", folder, free, needed)
