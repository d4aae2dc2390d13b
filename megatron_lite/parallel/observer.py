"""Observers of communication: an axis calls its observer before each call, once it is in flight, and
around every wait for other ranks.

Checking calls before they are made, recording them, timing them and timing the waits are observers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor


class Request(NamedTuple):
    """A collective, or one end of a message.

    op: all-reduce, all-gather, reduce-scatter, all-to-all, barrier, send or receive.
    axis, ranks: the group's name and members; of a message sender and receiver, as ranks of the world.
    tensor: the whole one: what an all-gather makes, what a reduce-scatter is given; of
    an all-to-all what has a part of or for every rank.
    what: the reduction (sum, max), or which message it is, said alike by both ends.
    """

    op: str
    axis: str
    ranks: tuple[int, ...]
    tensor: Tensor
    what: str = ""

    @property
    def own_bytes(self) -> int:
        """Bytes that this rank contributes."""
        return self.tensor.nbytes // (len(self.ranks) if self.op == "all-gather" else 1)


_NOTHING = nullcontext()  # stateless, so that one serves every wait of a step


class Observer:
    """Base class and default: observes nothing; subclasses override what they want to see."""

    follows: bool = False
    """Whether all collectives must be asynchronous: a blocking call returns no work to follow."""

    def before(self, request: Request) -> None:
        """The call comes next; may raise DistributedError instead."""

    def started(self, request: Request, work: Any) -> Callable[[], None] | None:
        """The collective is in flight; the returned callback is called once it has been waited for."""
        return None

    def waiting(self, what: str = "") -> AbstractContextManager[object]:
        """Entered around each wait for other ranks; what: the message that is waited for."""
        return _NOTHING


NOBODY = Observer()


class _Several(Observer):
    """Calls all of them, in order."""

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
    """One observer that calls all of these."""
    if len(observers) > 1:
        return _Several(observers)
    return observers[0] if observers else NOBODY
