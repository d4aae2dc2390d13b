"""Gloo that behaves as NCCL does where it hurts: what is begun is there when it is waited for, not before.

async call     results hold poison and sources must stay as they are until wait(); a stream is first
               in, first out: wait() ends all earlier calls of the same communicator, too
batch          of messages: one work, as NCCL answers
blocking call  behind calls in flight on its communicator: a fault, since it waits for all of them
the end        whatever nobody has waited for is a fault
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.parallel import collectives
from megatron_lite.parallel.context import Axis, ParallelContext
from tests.support.places import PACKAGE


class Fault(AssertionError):
    """What would go wrong with another communicator's timing."""


class Event(NamedTuple):
    """begin and end of a call in flight, a blocking call, or a note of the test: in the order they happen."""

    kind: str
    what: str
    axis: str = ""
    line: str = ""


@dataclass(eq=False)
class Work:
    """A call in flight.

    outputs: (the caller's tensor, where the result really comes); sources: (the caller's, its bits when begun).
    """

    late: Late
    name: str
    axis: str
    queue: list[Work]
    real: Sequence[Any]
    outputs: Sequence[tuple[Tensor, Tensor]]
    sources: Sequence[tuple[Tensor, Tensor]]
    line: str
    poison: list[Tensor] = field(default_factory=list)
    is_done: bool = False

    def __post_init__(self) -> None:
        self.poison = [mine.clone() for mine, _ in self.outputs]
        self.queue.append(self)
        self.late.events.append(Event("begin", self.name, self.axis, self.line))

    def is_completed(self) -> bool:
        """False until it has been waited for, or true early, at random, as a device may have it."""
        if not self.is_done and self.late.chance is not None and self.late.chance.random() < 0.5:
            self.wait()
        return self.is_done

    def wait(self, timeout: object = None) -> bool:
        """Let it arrive, and all that was begun before it."""
        while not self.is_done:
            self.queue.pop(0)._arrive()
        return True

    @torch.no_grad()
    def _arrive(self) -> None:
        if self.late.chance is not None:
            time.sleep(self.late.chance.random() * 2e-3)
        for real in self.real:
            real.wait()
        begun = f"{self.name} over {self.axis}, begun in {self.line}"
        for (mine, hidden), poison in zip(self.outputs, self.poison, strict=True):
            if not _same(mine, poison):
                raise Fault(f"the result of {begun}, was written to before {where()} waited")
            mine.copy_(hidden)
        for mine, before in self.sources:
            if not _same(mine, before):
                raise Fault(f"the source of {begun}, was changed before {where()} waited")
        self.is_done = True
        self.late.events.append(Event("end", self.name, self.axis, where()))


class Late:
    """All communicators of a context, and what happened on them.

    blocking_behind: whether a blocking call may stand behind calls in flight on its communicator.
    seed: shuffles how far ranks are of each other, and lets works be complete early; None: neither.
    """

    def __init__(
        self, ctx: ParallelContext, *, blocking_behind: bool = False, seed: int | None = None
    ) -> None:
        self.events: list[Event] = []
        self.blocking_behind = blocking_behind
        self.chance = None if seed is None else random.Random(seed * 1000 + ctx.rank)
        self._queues: dict[int, list[Work]] = {}
        held = (getattr(ctx, each.name) for each in fields(ctx))
        self._names = {id(axis.group): axis.name for axis in held if isinstance(axis, Axis)}

    def note(self, what: str) -> None:
        """Have a place of the test among the events."""
        self.events.append(Event("note", what))

    @contextmanager
    def everywhere(self) -> Iterator[Late]:
        """Within, every collective and message of this process is late."""
        patches = [
            (dist, "all_reduce", self._all_reduce(dist.all_reduce)),
            (dist, "batch_isend_irecv", self._batch(dist.batch_isend_irecv)),
            (dist, "all_to_all_single", self._pair("all-to-all", dist.all_to_all_single)),
            (collectives, "_gather_into", self._pair("all-gather", collectives._gather_into)),
            (collectives, "_scatter_into", self._pair("reduce-scatter", collectives._scatter_into)),
            *((dist, name, self._blocking(name)) for name in ("barrier", "send", "recv")),
        ]
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(mock.patch.object(*patch))
            yield self
        for queue in self._queues.values():
            for work in queue:
                raise Fault(f"{work.name} over {work.axis}, begun in {work.line}: never waited for")

    def in_flight(self, op: str, axis: str) -> list[int]:
        """How many of these calls are in flight after each begin and end."""
        found, now = [], 0
        for event in self.events:
            if (event.what, event.axis) == (op, axis) and event.kind in ("begin", "end"):
                now += 1 if event.kind == "begin" else -1
                found.append(now)
        return found

    def _issue(self, name: str, group: Any, *, blocking: bool) -> tuple[str, list[Work], str]:
        """Axis, calls in flight on it, and the line that makes this one."""
        key = id(dist.group.WORLD if group is None else group)
        axis, queue, line = (
            self._names.get(key, "another"),
            self._queues.setdefault(key, []),
            where(),
        )
        if blocking:
            self.events.append(Event("call", name, axis, line))
            if queue and not self.blocking_behind:
                first = queue[0]
                raise Fault(
                    f"{name} over {axis}, in {line}, blocks behind {len(queue)} in flight there: "
                    f"{first.name}, begun in {first.line}"
                )
        return axis, queue, line

    def _all_reduce(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def all_reduce(
            x: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
        ) -> Any:
            axis, queue, line = self._issue("all-reduce", group, blocking=not async_op)
            if not async_op:
                return real(x, op=op, group=group)
            hidden = x.clone()
            work = real(hidden, op=op, group=group, async_op=True)
            _ramp(x)
            return Work(self, "all-reduce", axis, queue, [work], [(x, hidden)], [], line)

        return all_reduce

    def _pair(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """A collective from one tensor into another."""

        def call(
            out: Tensor,
            x: Tensor,
            *others: Any,
            group: Any = None,
            async_op: bool = False,
            **more: Any,
        ) -> Any:
            axis, queue, line = self._issue(name, group, blocking=not async_op)
            if not async_op:
                return real(out, x, *others, group=group, **more)
            hidden, before = torch.empty_like(out), x.clone()
            work = real(hidden, before, *others, group=group, async_op=True, **more)
            _poison(out)
            return Work(self, name, axis, queue, [work], [(out, hidden)], [(x, before)], line)

        return call

    def _batch(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def batch(operations: Sequence[dist.P2POp]) -> list[Work]:
            axis, queue, line = self._issue("messages", operations[0].group, blocking=False)
            outputs, sources, ours = [], [], []
            for asked in operations:
                copy = asked.tensor.clone()
                if asked.op is dist.irecv:
                    _poison(asked.tensor)
                    outputs.append((asked.tensor, copy))
                else:
                    sources.append((asked.tensor, copy))
                ours.append(dist.P2POp(asked.op, copy, asked.peer, asked.group))
            return [Work(self, "messages", axis, queue, real(ours), outputs, sources, line)]

        return batch

    def _blocking(self, name: str) -> Callable[..., Any]:
        real = getattr(dist, name)

        def call(*arguments: Any, group: Any = None, **more: Any) -> Any:
            self._issue(name, group, blocking=True)
            return real(*arguments, group=group, **more)

        return call


def where() -> str:
    """The innermost line of the package that is not of its collectives; "a test" where there is none."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if PACKAGE in file.parents and file.name != "collectives.py":
            return f"{file.relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "a test"


def _poison(x: Tensor) -> None:
    """What nobody may compute with."""
    x.fill_(float("nan") if x.dtype.is_floating_point else torch.iinfo(x.dtype).min)


def _ramp(x: Tensor) -> None:
    """For what is source and result: nan would swallow what is added to it, here each addition shows."""
    steps = torch.arange(x.numel(), device=x.device) % 97
    x.copy_((1 + steps / 97 if x.dtype.is_floating_point else 1 + steps).to(x.dtype).view(x.shape))


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit; not where a's memory has been given back."""
    if a.untyped_storage().nbytes() < b.nbytes:
        return False
    bits = [x.reshape(-1).view(torch.uint8) for x in (a, b)]
    return torch.equal(*bits)
