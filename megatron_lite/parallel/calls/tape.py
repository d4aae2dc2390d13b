"""What a rank asks of others, written down call by call: with its place in the step and the line that asked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from torch import Tensor

from megatron_lite.blueprint.schedules.actions import MESSAGES, Action, Op
from megatron_lite.parallel.calls.transcript import Call, Transcript, message_name

_PACKAGE = f"{Path(__file__).parents[2]}/"
_TALKING = ("parallel/calls/tape.py", "parallel/collectives.py", "rehearsal/process_group.py")


class Tape:
    """Writes a rank's calls down, each with its place in the step and the line that made it."""

    def __init__(self, transcript: Transcript) -> None:
        self.transcript = transcript
        self.place = "before its list"
        self.part = "step"
        self.step: int | None = None
        self._messages: list[Action] = []

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
