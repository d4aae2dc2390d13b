"""A process group that talks to nobody and writes down every call: any rank of a world runs alone.

with alone(rank, world_size):
    ctx = ParallelContext.from_grid(grid, rank, device)     the real groups of the real grid
    tape = Tape(Transcript(rank), ...); tape.listen(ctx)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from megatron_lite.blueprint.schedules.actions import MESSAGES, Action, Op
from megatron_lite.parallel.collectives import reduction_name
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.transcript import Call, Transcript, message_name

BACKEND = "rehearsal"

_PACKAGE = f"{Path(__file__).parents[1]}/"
_TALKING = ("parallel/recording.py", "parallel/collectives.py")


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


class Tape:
    """Writes a rank's calls down, each with its place in the step and the line that made it."""

    def __init__(self, transcript: Transcript) -> None:
        self.transcript = transcript
        self.place = "before its list"
        self.part = "step"
        self.step: int | None = None
        self._messages: list[Action] = []

    def listen(self, ctx: ParallelContext) -> None:
        """Write down what this context's groups are asked for from now on."""
        for axis in (ctx.tp, ctx.cp, ctx.dp, ctx.pp, ctx.model, ctx.tied, ctx.world):
            if isinstance(axis.group, RecordedGroup):
                axis.group.tape, axis.group.axis, axis.group.ranks = self, axis.name, axis.ranks

    def begin(self, part: str) -> None:
        """A training step or an evaluation begins."""
        self.step, self.part, self._messages = None, part, []
        self.place = f"{part}, before its list"

    def reached(self, position: int, group: Sequence[Action]) -> None:
        """The rank's list has come to a group of actions; past its end the group is empty."""
        if not group:
            self.step, self.place = None, f"{self.part}, after its list"
            return
        self.step = position
        names = ", ".join(map(str, group))
        self.place = f"{self.part}, action {position + 1} ({names})"
        self._messages = [a for a in reversed(group) if a.op in MESSAGES]

    def collective(
        self, op: str, axis: str, ranks: tuple[int, ...], tensor: Tensor, what: str
    ) -> None:
        """A call of all members of a group."""
        self._write(op, axis, ranks, tensor, what)

    def message(self, op: str, axis: str, tensor: Tensor, peer: int) -> None:
        """One end of a message to or from a rank of the world; the list says which one it is."""
        me = self.transcript.rank
        what = _content(self._messages.pop()) if self._messages else ""
        ends = (me, peer) if op == "send" else (peer, me)
        self._write(op, axis, ends, tensor, what)

    def _write(self, op: str, axis: str, ranks: tuple[int, ...], tensor: Tensor, what: str) -> None:
        self.take(
            Call(
                op=op,
                axis=axis,
                ranks=ranks,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                element_bytes=tensor.element_size(),
                what=what,
                place=self.place,
                step=self.step,
                line=self._line(),
            )
        )

    def take(self, call: Call) -> None:
        """Keep it."""
        self.transcript.calls.append(call)

    def arrives(self, what: str) -> None:
        """A message is about to be waited for."""

    def _line(self) -> str:
        """file:line of ours that made the call under way: a layer's or the engine's if there is one."""
        frame: FrameType | None = sys._getframe(2)
        innermost = None
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(_PACKAGE):
                inside = name[len(_PACKAGE) :]
                if inside not in _TALKING:
                    innermost = innermost or (inside, frame)
                    if not inside.startswith("parallel/"):
                        break
            frame = frame.f_back
        if innermost is None:
            return ""
        if frame is not None and not inside.startswith("pipeline/"):  # else autograd's own region
            innermost = (inside, frame)
        file, at = innermost
        return f"{file}:{at.f_lineno} {at.f_code.co_name}"


def _content(action: Action) -> str:
    """Which value a message carries, said alike by both ends."""
    op, stage, m = action
    into = {Op.SEND_F: stage + 1, Op.SEND_B: stage - 1}.get(op, stage)
    return message_name(op in (Op.SEND_F, Op.RECV_F), into, m)
