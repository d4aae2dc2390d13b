"""When a run stops: finished, asked by a signal, or at an interval or time the user set."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from types import FrameType
from typing import Literal, NamedTuple

from megatron_lite.config.train import TrainConfig

Reason = Literal["finished", "signal", "exit-interval", "exit-duration"]


class StopVote(NamedTuple):
    """Why one rank asks for a stop; added up over the world, so that all ranks stop for one reason."""

    signalled: bool = False
    over_time: bool = False


NO_VOTE = StopVote()


@dataclass(slots=True)
class StopRequests:
    """Collects requests on this rank; the step agrees on them over the world.

    A second Ctrl-C while the first is being carried out ends the process at once: the older
    checkpoints are whole whatever happens.
    """

    train: TrainConfig
    started: float = field(default_factory=time.monotonic)
    signalled: str | None = None

    def listen(self) -> None:
        """Catch SIGTERM, SIGUSR1 and Ctrl-C instead of dying of them."""
        if not self.train.exit_signal_handler:
            return
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signalled is not None and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.signalled = signal.Signals(number).name

    def vote(self) -> StopVote:
        """What this rank asks for after the coming step."""
        minutes = self.train.exit_duration_in_mins
        over = minutes is not None and (time.monotonic() - self.started) / 60.0 >= minutes
        return StopVote(self.signalled is not None, over)

    def reason(self, step: int, *, agreed: StopVote, finished: bool) -> Reason | None:
        """Why to stop after this step, or None; `agreed`: what any rank of the world asked for."""
        if finished:
            return "finished"
        if agreed.signalled:
            return "signal"
        if agreed.over_time:
            return "exit-duration"
        every = self.train.exit_interval
        return "exit-interval" if every and step % every == 0 else None
