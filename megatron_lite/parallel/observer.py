"""The one tap on what a rank asks of others: an axis tells its observer before a call, once it has begun,
and around every wait.

    checking calls before they are made, writing them down, timing them, timing the waits for others
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor


class Request(NamedTuple):
    """A collective, or one end of a message.

    op: all-reduce, all-gather, reduce-scatter, barrier, send or receive.
    axis, ranks: the group's name and members; of a message sender and receiver, as ranks of the world.
    tensor: the whole one: what an all-gather makes, what a reduce-scatter is given.
    what: the reduction (sum, max), or which message it is, said alike by both ends.
    """

    op: str
    axis: str
    ranks: tuple[int, ...]
    tensor: Tensor
    what: str = ""

    @property
    def own_bytes(self) -> int:
        """Bytes of what this rank brings."""
        return self.tensor.nbytes // (len(self.ranks) if self.op == "all-gather" else 1)


_NOTHING = nullcontext()


class Observer:
    """Looks at nothing; whoever looks overrides what it wants to be told."""

    follows: bool = False
    """Whether collectives are to run beside the host, so that `started` can see them end."""

    def before(self, request: Request) -> None:
        """The call comes next; may raise DistributedError instead."""

    def started(self, request: Request, work: Any) -> Callable[[], None] | None:
        """The collective is in flight; what is returned is called when somebody has waited for it."""
        return None

    def waiting(self, what: str = "") -> AbstractContextManager[object]:
        """Entered around each wait for other ranks; what: the message that is waited for."""
        return _NOTHING


NOBODY = Observer()


class _Several(Observer):
    """All are told, in their order."""

    def __init__(self, observers: tuple[Observer, ...]) -> None:
        self._observers = observers
        self.follows = any(one.follows for one in observers)

    def before(self, request: Request) -> None:
        for one in self._observers:
            one.before(request)

    def started(self, request: Request, work: Any) -> Callable[[], None] | None:
        told = [one.started(request, work) for one in self._observers]
        ends = [end for end in told if end is not None]

        def ended() -> None:
            for end in ends:
                end()

        return ended if ends else None

    @contextmanager
    def waiting(self, what: str = "") -> Iterator[None]:
        with ExitStack() as stack:
            for one in self._observers:
                stack.enter_context(one.waiting(what))
            yield


def together(*observers: Observer) -> Observer:
    """One that tells all of these."""
    if len(observers) > 1:
        return _Several(observers)
    return observers[0] if observers else NOBODY
