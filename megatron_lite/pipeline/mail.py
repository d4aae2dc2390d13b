"""Sends and receives between neighbouring stages: posted as the schedule says, waited for at use."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.blueprint.schedules.actions import Action, Op
from megatron_lite.parallel.context import Axis

_SENDS = (Op.SEND_F, Op.SEND_B)


@dataclass(slots=True)
class Mail:
    """Messages of this pp rank.

    placement: stage -> pp rank.  A message between two stages of one rank is handed over without
    communication.  Keys are (is_forward, receiving stage, microbatch).
    """

    pp: Axis
    placement: Sequence[int]
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    _outgoing: dict[tuple[bool, int, int], Tensor] = field(default_factory=dict)
    _incoming: dict[tuple[bool, int, int], Tensor] = field(default_factory=dict)
    _works: dict[tuple[bool, int, int], list[Any]] = field(default_factory=dict)
    _sent: deque[tuple[list[Any], list[Tensor]]] = field(default_factory=deque)

    def expect(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """The form of all messages of the coming step: [s/tp, b, h]."""
        self.shape, self.dtype, self.device = shape, dtype, device

    def put(self, x: Tensor, *, forward: bool, stage: int, microbatch: int) -> None:
        """Leave what `stage` must get: for a later send, or in its own hands if it is on this rank."""
        key = (forward, stage, microbatch)
        if self.placement[stage] == self.pp.rank:
            self._incoming[key] = x
        else:
            self._outgoing[key] = x.contiguous()

    def take(self, *, forward: bool, stage: int, microbatch: int) -> Tensor:
        """Wait for what `stage` is to get and hand it over."""
        key = (forward, stage, microbatch)
        for work in self._works.pop(key, ()):
            work.wait()
        return self._incoming.pop(key)

    def post(self, group: Sequence[Action]) -> None:
        """Start the sends and receives that meet here, as one batch."""
        operations, keys, sent = [], [], []
        for action in group:
            forward = action.op in (Op.SEND_F, Op.RECV_F)
            if action.op in _SENDS:
                stage = action.stage + (1 if forward else -1)
                key = (forward, stage, action.microbatch)
                message = self._outgoing.pop(key)
                sent.append(message)
            else:
                stage = action.stage + (-1 if forward else 1)
                key = (forward, action.stage, action.microbatch)
                message = torch.empty(self.shape, dtype=self.dtype, device=self.device)
                self._incoming[key] = message
            receives = action.op not in _SENDS
            peer = self.pp.ranks[self.placement[stage]]
            call: Any = dist.irecv if receives else dist.isend
            keys.append((receives, key))
            operations.append(dist.P2POp(call, message, peer, self.pp.group))
        self._drop_sent()
        works = dist.batch_isend_irecv(operations)
        each = [[w] for w in works] if len(works) == len(operations) else [works] * len(operations)
        for (receives, key), mine in zip(keys, each, strict=True):
            if receives:
                self._works[key] = mine
        self._sent.append(([w for m in each for w in m], sent))

    def _drop_sent(self) -> None:
        """Free the messages that have left, oldest first."""
        while self._sent and all(work.is_completed() for work in self._sent[0][0]):
            self._sent.popleft()

    def finish(self) -> None:
        """Wait until everything sent has left; nothing may be in the box."""
        for works, _ in self._sent:
            for work in works:
                if not work.is_completed():
                    work.wait()
        self._sent.clear()
        assert not (self._incoming or self._outgoing), "a message was never taken"
