"""Rank 0 leads the other ranks of a model: which texts join and leave the rows of its batch, and when it steps.

    rank 0     LeadingBatch ── orders, before each step ──▶ follow     every other rank
               (model_thread.py)  ◀── whether one is asked to stop ──

Each order is one small tensor that all ranks add up over gloo, and its words where there are any: who
waits for the next one sleeps in its socket.  Where nothing is to do, rank 0 sends an empty one now and
then, so that a rank that died is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_lite.inference.generate import RunningBatch, TextRequest, Token
from megatron_lite.inference.sampling import Sampling
from megatron_lite.inference.serving.picking import Picker, Settings, share_chances
from megatron_lite.parallel.collectives import all_reduce
from megatron_lite.parallel.context import Axis, ParallelContext

_PATIENCE = timedelta(days=7)  # no request for a night is no failure: the watch finds who is lost
_REST, _STEP, _END = range(3)


@dataclass(slots=True)
class OrderLine:
    """All ranks of a model, over a group that nothing else uses.

    heard: called after each order, with their number so far.
    """

    axis: Axis
    heard: Callable[[int], None]
    _count: int = 0

    @classmethod
    def between(cls, ctx: ParallelContext, heard: Callable[[int], None]) -> OrderLine:
        """Collective over the world: every rank makes it alike."""
        world = ctx.world
        group = dist.new_group(backend="gloo", timeout=_PATIENCE) if world.size > 1 else None
        return cls(Axis("orders", world.rank, world.size, world.ranks, group), heard)

    def exchange(self, kind: int, words: bytes = b"", *, stop: bool = False) -> RankOrder:
        """What rank 0 says, on every rank; the others say 0 and no words."""
        head = all_reduce(torch.tensor([kind, len(words), int(stop)]), self.axis)
        kind, length, stops = head.tolist()
        if length:
            letters = torch.zeros(length, dtype=torch.uint8)
            if words:
                letters = torch.frombuffer(bytearray(words), dtype=torch.uint8)
            words = bytes(all_reduce(letters, self.axis).numpy())
        self._count += 1
        self.heard(self._count)
        return RankOrder(kind, json.loads(words) if length else [], stop=stops > 0)


@dataclass(frozen=True, slots=True)
class RankOrder:
    """changes: texts that join or leave, in their order.  stop: a rank is asked to stop."""

    kind: int
    changes: list[dict[str, Any]]
    stop: bool


class SharedBatch(RunningBatch):
    """A running batch whose requests pick by a Picker; every rank knows what the last stage picked."""

    pickers: dict[int, Picker]

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.pickers = {}

    def join(self, request: int, asked: TextRequest) -> None:
        """See RunningBatch."""
        assert isinstance(asked.pick, Picker)
        self.pickers[request] = asked.pick
        super().join(request, asked)

    def leave(self, request: int) -> None:
        """See RunningBatch."""
        del self.pickers[request]
        super().leave(request)

    def step(self) -> list[Token]:
        """See RunningBatch."""
        found = super().step()
        share_chances([self.pickers[token.request] for token in found], self._held.ctx)
        for token in found:
            if token.end is not None:
                del self.pickers[token.request]
        return found


@dataclass(slots=True)
class Leader:
    """Rank 0's side of the line.  stop: called where another rank is asked to stop."""

    line: OrderLine
    stop: Callable[[], None]
    changes: list[dict[str, Any]] = field(default_factory=list)

    def rest(self) -> None:
        """Nothing is to do: are all still there?"""
        self._send(_REST)

    def step(self) -> None:
        """The others make the step that this rank is about to make."""
        self._send(_STEP)

    def end(self) -> None:
        """The others end."""
        self._send(_END)

    def _send(self, kind: int) -> None:
        words = json.dumps(self.changes).encode() if self.changes else b""
        self.changes = []
        if self.line.exchange(kind, words).stop:
            self.stop()


class LeadingBatch(SharedBatch):
    """Rank 0's batch: the other ranks do what is done with it."""

    def __init__(self, leader: Leader, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._leader = leader

    def join(self, request: int, asked: TextRequest) -> None:
        """See RunningBatch."""
        super().join(request, asked)
        self._leader.changes.append({"join": request, **_said(asked, self.pickers[request])})

    def leave(self, request: int) -> None:
        """See RunningBatch."""
        super().leave(request)
        self._leader.changes.append({"leave": request})

    def step(self) -> list[Token]:
        """See RunningBatch."""
        self._leader.step()
        return super().step()


def follow(batch: SharedBatch, line: OrderLine, *, ids: int, stop: Callable[[], bool]) -> None:
    """Do with the batch what rank 0 does with its own, until it ends.

    ids: see Picker.  stop: whether this rank is asked to stop, which rank 0 then hears.
    """
    while True:
        order = line.exchange(0, stop=stop())
        for change in order.changes:
            if "leave" in change:
                batch.leave(change["leave"])
            else:
                batch.join(change["join"], _request(change, ids))
        if order.kind == _STEP:
            batch.step()
        elif order.kind == _END:
            return


def _said(asked: TextRequest, picker: Picker) -> dict[str, Any]:
    """A request in words."""
    return {
        "prompt": list(asked.prompt), "new": asked.max_new_tokens, "ends": sorted(asked.ends),
        "number": picker.number, "settings": asdict(picker.settings),
    }  # fmt: skip


def _request(said: dict[str, Any], ids: int) -> TextRequest:
    """The request that the words describe."""
    settings = dict(said["settings"])
    settings["sampling"] = Sampling(**settings["sampling"])
    settings["bias"] = {int(token): value for token, value in settings["bias"].items()}
    prompt = said["prompt"]
    picker = Picker(Settings(**settings), said["number"], prompt=len(prompt), ids=ids)
    return TextRequest(prompt, said["new"], picker, frozenset(said["ends"]))
