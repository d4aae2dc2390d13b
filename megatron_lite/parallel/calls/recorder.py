"""Records a rank's communication calls, each with its place in the step and the line that made it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_lite.blueprint.schedules.actions import Action
from megatron_lite.parallel.calls.log import Call, CallLog
from megatron_lite.parallel.observer import Observer, Request

_PACKAGE = f"{Path(__file__).parents[2]}/"
_TALKING = ("parallel/calls/recorder.py", "parallel/collectives.py", "parallel/observer.py")


class CallRecorder(Observer):
    """Records a rank's calls, each with its place in the step and the line that made it."""

    def __init__(self, log: CallLog) -> None:
        self.log = log
        self.place = "before its list"
        self.part = "step"
        self.step: int | None = None

    def begin(self, part: str) -> None:
        """A training step or an evaluation begins."""
        self.step, self.part = None, part
        self.place = f"{part}, before its list"

    def reached(self, position: int, group: Sequence[Action]) -> None:
        """The rank's list has come to a group of actions; past its end the group is empty."""
        if not group:
            self.step, self.place = None, f"{self.part}, after its list"
            return
        self.step = position
        names = ", ".join(map(str, group))
        self.place = f"{self.part}, action {position + 1} ({names})"

    def before(self, request: Request) -> None:
        """Record the call."""
        tensor = request.tensor
        self.take(
            Call(
                op=request.op,
                axis=request.axis,
                ranks=request.ranks,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                element_bytes=tensor.element_size(),
                what=request.what,
                place=self.place,
                step=self.step,
                line=self._line(),
            )
        )

    def take(self, call: Call) -> None:
        """Append it to the log."""
        self.log.calls.append(call)

    def _line(self) -> str:
        """file:line in this package that made the current call: a layer's or the engine's if there is one."""
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
