"""How the ranks of a save agree: sums, and giving up together when one has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_lite.config.errors import StorageError
from megatron_lite.parallel.collectives import MAX, SUM, all_reduce
from megatron_lite.parallel.context import Axis, ParallelContext
from megatron_lite.storage.lock import FolderTaken

_WORDS = 1024  # bytes of what one rank tells the others
_PATIENCE = timedelta(days=7)  # a slow disk is no lost rank: those are the business of the watch


@dataclass(frozen=True, slots=True)
class Agreement:
    """All ranks of the world, over a group that one thread at a time uses, and that group's device."""

    world: Axis
    device: torch.device

    @classmethod
    def of_the_step(cls, ctx: ParallelContext) -> Agreement:
        """Over the group the training step uses: for the main thread."""
        return cls(ctx.world, ctx.device)

    @classmethod
    def of_a_thread(cls, ctx: ParallelContext) -> Agreement:
        """Over a group of its own, through host memory: for a thread beside the training step.

        Collective over the world: every rank makes it alike.
        """
        cpu = torch.device("cpu")
        if ctx.world.size == 1:
            return cls(ctx.world, cpu)
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        world = ctx.world
        return cls(Axis("save", world.rank, world.size, world.ranks, group), cpu)

    def total(self, own: int) -> int:
        """The sum over all ranks."""
        count = torch.tensor([own], dtype=torch.int64, device=self.device)
        return int(all_reduce(count, self.world, SUM).item())  # waits for the device

    def any(self, own: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.most(int(own)))

    def most(self, own: int) -> int:
        """The largest over all ranks."""
        value = torch.tensor([own], dtype=torch.int32, device=self.device)
        return int(all_reduce(value, self.world, MAX).item())  # waits for the device

    def told(self, own: str | None) -> str | None:
        """The message of the first rank that has one, on all ranks; None where none has."""
        turn = self.world.size - self.world.rank if own is not None else 0
        first = torch.tensor([turn], dtype=torch.int32, device=self.device)
        first = all_reduce(first, self.world, MAX)
        if not first.item():  # waits for the device
            return None
        text = (own or "").encode()[:_WORDS] if first.item() == turn else b""
        letters = torch.tensor(list(text.ljust(_WORDS, b"\0")), dtype=torch.int32)
        said = all_reduce(letters.to(self.device), self.world, SUM)
        return bytes(said.tolist()).rstrip(b"\0").decode(errors="replace")

    @contextlib.contextmanager
    def together(self, what: str, undo: Callable[[], None] | None = None) -> Iterator[None]:
        """Run a part; where it failed on any rank, all ranks raise, the others StorageError.

        Where another run has taken the folder all ranks raise FolderTaken.

        what: completes "another rank could not ..."; undo: called on every rank after a failure.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # whatever it is: the others must not wait for this rank
            failure = error
        worst = self.most(2 if isinstance(failure, FolderTaken) else int(failure is not None))
        if not worst:
            return
        if undo is not None:
            with contextlib.suppress(StorageError):
                undo()
        kind = FolderTaken if worst == 2 else StorageError
        raise failure or kind(
            f"another rank could not {what}: see its FATAL line; the older checkpoints are untouched"
        )
