"""When a run stops: finished, asked by a signal, or at an interval or time the user set."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from types import FrameType
from typing import Literal, NamedTuple

from megatron_lite.config.sections.train import TrainConfig

Reason = Literal["finished", "signal", "kill-switch", "exit-interval", "exit-duration"]
PREEMPTIONS: tuple[Reason, ...] = ("signal", "kill-switch")
"""Stops that the command line did not ask for: there is no time for an evaluation, and code 75."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """What asks a run to stop; not SIGHUP where nohup has it ignored: that run outlives its terminal."""
    asked = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGQUIT, signal.SIGXCPU]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        asked.append(signal.SIGHUP)
    return tuple(asked)


class StopVote(NamedTuple):
    """Why one rank asks for a stop; added up over the world, so that all ranks stop for one reason.

    save_failed: a checkpoint could not be written beside the training, which may stop the run.
    """

    signalled: bool = False
    over_time: bool = False
    killed: bool = False
    save_failed: bool = False


NO_VOTE = StopVote()


class Stopped(KeyboardInterrupt):
    """A signal that ends the process at once: before the first step, or asked for again."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(slots=True)
class StopRequests:
    """Collects requests on this rank; the step agrees on them over the world.

    A second Ctrl-C while the first is being carried out ends the process at once, and so does a
    SIGTERM that comes `patience` seconds after the first signal: the older checkpoints are whole
    whatever happens.  looks: whether this rank is the one that looks for the kill switch.
    """

    train: TrainConfig
    looks: bool = True
    started: float = field(default_factory=time.monotonic)
    signalled: float | None = None
    patience: float = 30.0
    killed: bool = False
    _looked: float = float("-inf")

    def listen(self) -> None:
        """Turn the signals that ask for a stop into requests instead of dying of them."""
        if not self.train.exit_signal_handler:
            return
        for number in stop_signals():
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signalled is None:
            self.signalled = now
        elif number == signal.SIGINT or (
            number == signal.SIGTERM and now - self.signalled >= self.patience
        ):
            signal.signal(number, signal.SIG_DFL)
            raise Stopped(number)

    def vote(self, *, save_failed: bool = False) -> StopVote:
        """What this rank asks for after the coming step."""
        minutes = self.train.exit_duration_in_mins
        over = minutes is not None and (time.monotonic() - self.started) / 60.0 >= minutes
        return StopVote(self.signalled is not None, over, self._kill_switch(), save_failed)

    def _kill_switch(self) -> bool:
        """Whether the file is there; asked once a second, since it may lie on a slow file system."""
        path, now = self.train.kill_switch_file, time.monotonic()
        if path is not None and self.looks and not self.killed and now - self._looked >= 1.0:
            self._looked = now
            self.killed = os.path.exists(path)
        return self.killed

    def reason(self, step: int, *, agreed: StopVote, finished: bool) -> Reason | None:
        """Why to stop after this step, or None; `agreed`: what any rank of the world asked for."""
        if finished:
            return "finished"
        if agreed.signalled:
            return "signal"
        if agreed.killed:
            return "kill-switch"
        if agreed.over_time:
            return "exit-duration"
        every = self.train.exit_interval
        return "exit-interval" if every and step % every == 0 else None
