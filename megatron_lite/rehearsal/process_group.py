"""A process group without peers: any rank of a world runs alone.

with alone(rank, world_size):
    ctx = ParallelContext.from_grid(grid, rank, device)     the real groups of the real grid
    ctx.observed(CallRecorder(CallLog(rank)))                what it asks of others, written down
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

BACKEND = "rehearsal"


class _Done:
    """A call without peers; as with gloo it is not known to have ended before wait()."""

    def wait(self, timeout: object = None) -> bool:
        """At once."""
        return True

    def is_completed(self) -> bool:
        """Not before wait()."""
        return False


class SilentGroup(dist.ProcessGroup):
    """Stands in for gloo or NCCL; leaves every tensor as it is."""

    def getBackendName(self) -> str:
        """As registered."""
        return BACKEND

    def allreduce(self, tensors: Any, opts: Any = None, *_: Any) -> Any:
        """x stays this rank's."""
        return _Done()

    def all_gather_single(self, output: Tensor, x: Tensor, options: Any = None) -> Any:
        """output stays unfilled."""
        return _Done()

    def reduce_scatter_single(self, output: Tensor, x: Tensor, options: Any = None) -> Any:
        """output stays unfilled."""
        return _Done()

    def all_to_all_single(self, output: Tensor, x: Tensor, *_: Any) -> Any:
        """output stays unfilled."""
        return _Done()

    # torch < 2.13
    alltoall_base = all_to_all_single  # type: ignore[assignment]
    _allgather_base = all_gather_single  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def barrier(self, *_: Any, **options: Any) -> Any:
        """Alone, at once."""
        return _Done()

    def send(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Any:
        """Sends nothing."""
        return _Done()

    def recv(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Any:
        """The box stays empty."""
        return _Done()

    def shutdown(self) -> None:
        """Nothing is open."""


def _create(options: Any, _: Any) -> SilentGroup:
    return SilentGroup(options.group_rank, options.group_size)  # type: ignore[call-arg]


@contextmanager
def simulated_rank(rank: int, world_size: int) -> Iterator[None]:
    """Run this process as one rank of a world whose other ranks do not exist."""
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])
    hook = sys.excepthook
    if world_size > 1:
        dist.init_process_group(BACKEND, store=HashStore(), rank=rank, world_size=world_size)
        sys.excepthook = hook  # torch's names the rank, of which there will be several
    try:
        yield
    finally:
        if world_size > 1:
            dist.destroy_process_group()
