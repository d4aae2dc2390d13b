"""Rank faults on purpose: MLITE_FAULT="<point>:<rank>:<action>", for tests and fire drills.

    MLITE_FAULT=step3.forward:1:sigkill     rank 1 is killed in the first forward of iteration 3
    MLITE_FAULT=step2:1:sleep120            rank 1 sleeps two minutes at the begin of iteration 2
    MLITE_FAULT=step4.gradient:0:nan        rank 0's gradients of iteration 4 become nan
    MLITE_FAULT=save.after_share:0:exit     rank 0 leaves after writing its share of a checkpoint

points   start                  data, model and checkpoint are open, no step yet
         step<N>                iteration N (from 1) begins
         step<N>.forward        a stage's first forward of it
         step<N>.backward       a stage's first backward of it
         step<N>.gradient       before the last backward, whose gradients are reduced as they come
         step<N>.reduce         all backwards are done, the sums over ranks and the update come
         evaluate               an evaluation batch
         save.begin             a checkpoint is begun
         save.after_share       this rank has written its tensors
         save.before_complete   all ranks have; the manifest and the rename come
         save.end               the checkpoint is complete
actions  sigkill sigstop sigterm sigint    that signal to the rank itself
         exit                   end at once, code 9, without a word
         sleep<seconds> hang    stay in Python
         error<code>            raise the failure of that exit code (2 to 7)
         bug                    raise a RuntimeError nobody foresaw
         nan                    gradients become nan: at step<N>.gradient those of all ranks, because
                                they are summed; at step<N>.reduce perhaps only this rank's copy

Each fault happens once in a process; with `:once` behind the action not after a restart of the ranks
by torchrun.  Unset, it costs one call of an empty method at the points outside the
step and nothing within it: the points inside a step are hooks that are then not installed.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_lite.config import errors
from megatron_lite.config.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.train.assemble import Run

IN_STEP = ("step", "forward", "backward", "gradient", "reduce")
OUTSIDE = (
    "start", "evaluate", "save.begin", "save.after_share", "save.before_complete", "save.end",
)  # fmt: skip
SIGNALS = ("sigkill", "sigstop", "sigterm", "sigint")
RAISED = {
    2: errors.ConfigError, 3: errors.DataError, 4: errors.CheckpointError, 5: errors.StorageError,
    6: errors.DistributedError, 7: errors.NumericsError,
}  # fmt: skip


class NoFaults:
    """Nothing goes wrong."""

    def attach(self, run: Run) -> None:
        """There is nothing to install."""

    def at(self, point: str) -> None:
        """Go on."""


@dataclass(slots=True)
class Fault:
    """One fault of this rank.  step: None at points outside a step."""

    point: str
    step: int | None
    action: str
    happened: bool = False
    run: Run | None = field(default=None, repr=False)

    def attach(self, run: Run) -> None:
        """Install the points inside a step."""
        self.run = run
        if self.point == "forward":
            for stage in run.pipeline.stages.values():
                stage.module.register_forward_pre_hook(self._hook("forward"))
        elif self.point == "backward":
            for stage in run.pipeline.stages.values():
                stage.module.register_full_backward_pre_hook(self._hook("backward"))
        elif self.point == "gradient":
            run.pipeline.arm = self._before(run.pipeline.arm, "gradient")
        elif self.point == "reduce":
            engine: Any = run.engine
            engine.step = self._before(run.engine.step, "reduce")

    def _hook(self, point: str) -> Callable[..., None]:
        return lambda *_: self.at(point)

    def _before(self, call: Callable[..., Any], point: str) -> Callable[..., Any]:
        def both(*args: Any, **kwargs: Any) -> Any:
            self.at(point)
            return call(*args, **kwargs)

        return both

    def at(self, point: str) -> None:
        """Go wrong, if this is the place."""
        if self.happened or point != self.point:
            return
        if self.step is not None:
            assert self.run is not None, "attach(run) comes first"
            if self.run.progress.step + 1 != self.step:
                return
        self.happened = True
        self._act()

    def _act(self) -> None:
        what = self.action
        if what in SIGNALS:
            os.kill(os.getpid(), getattr(signal, what.upper()))
        elif what == "exit":
            os._exit(9)
        elif what == "hang":
            _sleep(float("inf"))
        elif what.startswith("sleep"):
            _sleep(float(what.removeprefix("sleep")))
        elif what == "nan":
            assert self.run is not None
            for _, gradient in self.run.engine.accumulators():
                gradient.fill_(float("nan"))
        elif what == "bug":
            raise RuntimeError("a bug on purpose (MLITE_FAULT)")
        else:
            raise RAISED[int(what.removeprefix("error"))]("on purpose (MLITE_FAULT) - unset it")


def _sleep(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(0.5, max(end - time.monotonic(), 0.0)))


Faults = NoFaults | Fault


def read_fault(text: str | None, rank: int, world_size: int, attempt: int = 0) -> Faults:
    """The fault of this rank, NoFaults for the others; raises ConfigError for what is not one.

    attempt: how often the ranks were restarted.
    """
    if text is None:
        return NoFaults()
    point, _, rest = text.partition(":")
    number, _, action = rest.removesuffix(":once").partition(":")
    inside = re.fullmatch(r"step(\d+)(?:\.(\w+))?", point)
    name = (inside[2] or "step") if inside else point
    if name not in (IN_STEP if inside else OUTSIDE):
        raise _wrong(text, f"{point!r} is no point; choose step<N>, {_listed(IN_STEP[1:])} or one of "
                     f"{', '.join(OUTSIDE)}")  # fmt: skip
    if not number.isdigit() or int(number) >= world_size:
        raise _wrong(text, f"{number!r} is no rank of {world_size}, counted from 0")
    known = re.fullmatch(r"exit|hang|bug|nan|sleep\d+(\.\d+)?|error[2-7]", action)
    if action not in SIGNALS and not known:
        raise _wrong(text, f"{action!r} is no action; choose {', '.join(SIGNALS)}, exit, hang, "
                     "sleep<seconds>, error<2 to 7>, bug or nan")  # fmt: skip
    if action == "nan" and name not in ("gradient", "reduce"):
        raise _wrong(text, "nan is for step<N>.gradient and step<N>.reduce")
    if int(number) != rank or (attempt and text.endswith(":once")):
        return NoFaults()
    return Fault(name, int(inside[1]) if inside else None, action)


def _wrong(text: str, why: str) -> ConfigError:
    return ConfigError(f"MLITE_FAULT={text!r} in the environment: {why} - or unset it")


def _listed(points: tuple[str, ...]) -> str:
    return ", ".join(f"step<N>.{point}" for point in points)
