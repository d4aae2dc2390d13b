"""What one save writes: a rank's share of the slices where they lie, or copied to host memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.tensor_file import file_bytes
from megatron_lite.config.errors import StorageError
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import NamedSlice

FILE_KINDS = ("weights", "optimizer")
"""A rank writes one file of each, where it has any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a run reads: facts for the manifest, and the tokenizer's files, which rank 0 writes."""

    tokenizer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    tokenizer_files: dict[str, bytes] = field(default_factory=dict)


UNKNOWN = Origin()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One rank's part of a checkpoint, and what all ranks know alike.

    shares: what this rank writes, by KINDS.
    """

    iteration: int
    shares: dict[str, list[NamedSlice]]
    progress: Progress
    config: dict[str, Any]
    origin: Origin

    @property
    def bytes(self) -> int:
        """What this rank will write, to within the length of the names."""
        tensors = sum(file_bytes([s.data for s in slices]) for slices in self.shares.values())
        return tensors + sum(map(len, self.origin.tokenizer_files.values()))


def share(slices: Iterable[NamedSlice], ctx: ParallelContext) -> list[NamedSlice]:
    """What this rank writes: its own shards, and every n-th slice of what all n replicas hold."""
    filled = [s for s in slices if s.data.numel()]
    dealt = [s for s in filled if s.replicated][ctx.replicas.rank :: ctx.replicas.size]
    return [*dealt, *(s for s in filled if not s.replicated)]


class HostMemory:
    """Room for one rank's share in host memory, made once and used by every save.

    Pinned beside a GPU, so that the copy runs at the speed of the link; written to when it is made,
    so that no save waits for the system to find its pages.
    """

    def __init__(self) -> None:
        self._room: list[Tensor] = []

    def reserve(self, snapshot: Snapshot) -> None:
        """Make room for snapshots of such shapes; raises StorageError where there is none."""
        tensors = [s.data for slices in snapshot.shares.values() for s in slices]
        wanted = [(tuple(t.shape), t.dtype) for t in tensors]
        if wanted == [(tuple(room.shape), room.dtype) for room in self._room]:
            return
        self._room = []  # the old is let go before the new is made
        try:
            self._room = [
                torch.zeros(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in tensors
            ]
        except RuntimeError as error:
            raise StorageError(
                f"--async-save wants {snapshot.bytes / 1e9:.3f} GB of host memory on this rank, "
                f"which the system does not give ({str(error).splitlines()[0]}): leave it out"
            ) from error

    @torch.no_grad()
    def copy(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with its tensors in this memory, progress as it is now; waits for the device.

        Valid until the next copy.
        """
        self.reserve(snapshot)
        room = iter(self._room)
        shares: dict[str, list[NamedSlice]] = {}
        on_device = False
        for kind, slices in snapshot.shares.items():
            shares[kind] = []
            for piece in slices:
                target = next(room)
                target.copy_(piece.data.detach(), non_blocking=True)
                on_device |= piece.data.is_cuda
                shares[kind].append(dataclasses.replace(piece, data=target))
        if on_device:
            torch.cuda.current_stream().synchronize()  # waits for the device: this is the stall
        progress = copy.deepcopy(snapshot.progress)
        return dataclasses.replace(snapshot, shares=shares, progress=progress)
