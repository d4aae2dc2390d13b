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
from megatron_lite.parallel.observer import Request

_SENDS = (Op.SEND_F, Op.SEND_B)

_IN_FLIGHT = 2
"""Batches of sends in flight whose memory is kept; for an older one post() waits.

Gloo does not say that a send is done before wait(), so without a limit every message of a step would
stay in memory.  Waiting in post() cannot deadlock: schedules are proved for sends that block.
"""


def message_name(forward: bool, stage: int, microbatch: int) -> str:
    """Names a message, the same on both ends; stage: the receiving one."""
    kind = "activation" if forward else "gradient"
    return f"{kind} into stage {stage}, micro batch {microbatch}"


@dataclass(slots=True)
class Mail:
    """Messages of this pp rank.

    placement: stage -> pp rank.  A message between two stages of one rank is handed over without
    communication.  Keys are (is_forward, receiving stage, micro batch).
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
        """The shape of all messages of the coming step: [s/tp, b, h]."""
        self.shape, self.dtype, self.device = shape, dtype, device

    def put(self, x: Tensor, *, forward: bool, stage: int, microbatch: int) -> None:
        """Hand in a tensor for `stage`: kept for a later send, or delivered at once if it is on this rank."""
        key = (forward, stage, microbatch)
        if self.placement[stage] == self.pp.rank:
            self._incoming[key] = x
        else:
            self._outgoing[key] = x.contiguous()  # a send takes one stretch of memory

    def take(self, *, forward: bool, stage: int, microbatch: int) -> Tensor:
        """Wait for the tensor for `stage` and return it."""
        key = (forward, stage, microbatch)
        assert key in self._incoming, f"the {message_name(*key)} was never received"
        works = self._works.pop(key, ())
        if works:
            with self.pp.observer.waiting(message_name(*key)):
                for work in works:
                    work.wait()
        return self._incoming.pop(key)

    def post(self, group: Sequence[Action]) -> None:
        """Start the sends and receives that meet here, as one batch."""
        operations = [self._operation(action) for action in group]
        with (
            self.pp.observer.waiting()
        ):  # the first message of a pair waits until both have connected
            # one batch: NCCL runs its members together, while of two ranks that each begin with
            # their send, one after the other, neither would come to its receive
            works = dist.batch_isend_irecv(operations)
        together = len(works) < len(operations)  # NCCL answers with one work for the batch
        leaving: list[Any] = []
        for i, action in enumerate(group):
            mine = works if together else [works[i]]
            if action.op in _SENDS:
                leaving += mine
            else:
                key = (action.op is Op.RECV_F, action.stage, action.microbatch)
                self._works[key] = mine
        if leaving:
            # the stage has dropped its output: until it is sent this list alone keeps its memory
            sent = [op.tensor for op, a in zip(operations, group, strict=True) if a.op in _SENDS]
            self._sent.append((leaving, sent))
            self._free_sent(but=_IN_FLIGHT)

    def _operation(self, action: Action) -> dist.P2POp:
        """The send of a message, or the receive into an empty buffer, with its peer."""
        op, n, m = action
        stage = n + (1 if op in (Op.SEND_F, Op.RECV_B) else -1)  # at the other end
        if op in _SENDS:
            call: Any = dist.isend
            key = (op is Op.SEND_F, stage, m)
            assert key in self._outgoing, (
                f"the {message_name(*key)} is to be sent before it is there"
            )
            message = self._outgoing.pop(key)
        else:
            call = dist.irecv
            key = (op is Op.RECV_F, n, m)
            message = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self._incoming[key] = message
        me, peer = self.pp.ranks[self.pp.rank], self.pp.ranks[self.placement[stage]]
        end, ends = ("send", (me, peer)) if op in _SENDS else ("receive", (peer, me))
        self.pp.observer.before(Request(end, self.pp.name, ends, message, message_name(*key)))
        return dist.P2POp(call, message, peer, self.pp.group)

    def _free_sent(self, *, but: int) -> None:
        """Free sent messages, oldest first: all that are done; wait for all but the last `but`."""
        while self._sent:
            works = [work for work in self._sent[0][0] if not work.is_completed()]
            if works and len(self._sent) <= but:
                return
            with self.pp.observer.waiting():
                for work in works:
                    work.wait()
            self._sent.popleft()

    def finish(self) -> None:
        """Wait until every send is done; no message may be left over."""
        self._free_sent(but=0)
        left = [f"the {message_name(*key)} was never taken" for key in self._incoming]
        left += [f"the {message_name(*key)} was never sent" for key in self._outgoing]
        assert not left, "; ".join(left)
