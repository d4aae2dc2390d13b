"""A process group that talks to nobody and tells a tape of every call: any rank of a world runs alone.

with alone(rank, world_size):
    ctx = ParallelContext.from_grid(grid, rank, device)     the real groups of the real grid
    listen(ctx, Tape(Transcript(rank)))
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from megatron_lite.parallel.calls.tape import Tape
from megatron_lite.parallel.collectives import reduction_name
from megatron_lite.parallel.context import ParallelContext

BACKEND = "rehearsal"


class _Done:
    """A call that nobody answers; as with gloo it is not known to have ended before one waits."""

    def wait(self, timeout: object = None) -> bool:
        """At once."""
        return True

    def is_completed(self) -> bool:
        """Not before wait()."""
        return False


class RecordedGroup(dist.ProcessGroup):
    """Stands where gloo or NCCL would; leaves every tensor as it is and tells the tape."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.axis = ""
        self.ranks: tuple[int, ...] = (rank,)
        self.tape: Tape | None = None

    def getBackendName(self) -> str:
        """As registered."""
        return BACKEND

    def _say(self, op: str, tensor: Tensor, what: str = "") -> _Done:
        if self.tape is not None:
            self.tape.collective(op, self.axis, self.ranks, tensor, what)
        return _Done()

    def allreduce(self, tensors: Any, opts: Any = None, *_: Any) -> Any:
        """x stays this rank's."""
        return self._say("all-reduce", tensors[0], _reduction(opts))

    def all_gather_single(self, output: Tensor, x: Tensor, options: Any = None) -> Any:
        """output stays unfilled."""
        return self._say("all-gather", output)

    def reduce_scatter_single(self, output: Tensor, x: Tensor, options: Any = None) -> Any:
        """output stays unfilled."""
        return self._say("reduce-scatter", x, _reduction(options))

    # torch < 2.13
    _allgather_base = all_gather_single  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def barrier(self, options: Any = None) -> Any:
        """Alone, at once."""
        return self._say("barrier", torch.empty(0))

    def send(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Any:
        """peer counts in the group."""
        return self._tell_message("send", tensors[0], peer)

    def recv(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Any:
        """The box stays empty."""
        return self._tell_message("receive", tensors[0], peer)

    def _tell_message(self, op: str, tensor: Tensor, peer: int) -> _Done:
        if self.tape is not None:
            self.tape.message(op, self.axis, tensor, self.ranks[peer])
        return _Done()

    def shutdown(self) -> None:
        """Nothing is open."""


def _reduction(options: Any) -> str:
    return reduction_name(getattr(options, "reduceOp", None))


def _create(options: Any, _: Any) -> RecordedGroup:
    return RecordedGroup(options.group_rank, options.group_size)


@contextmanager
def alone(rank: int, world_size: int) -> Iterator[None]:
    """This process as one rank of a world whose other ranks do not exist."""
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


def listen(ctx: ParallelContext, tape: Tape) -> None:
    """Write down what this context's groups are asked for from now on."""
    for axis in (ctx.tp, ctx.cp, ctx.dp, ctx.pp, ctx.model, ctx.tied, ctx.world):
        if isinstance(axis.group, RecordedGroup):
            axis.group.tape, axis.group.axis, axis.group.ranks = tape, axis.name, axis.ranks
