"""Fault injection: MLITE_FAULT="<point>:<rank>:<action>", for tests and fire drills.

    MLITE_FAULT=step3.forward:1:sigkill     rank 1 is killed in the first forward of iteration 3
    MLITE_FAULT=step2:1:sleep120            rank 1 sleeps two minutes at the begin of iteration 2
    MLITE_FAULT=step4.gradient:0:nan        rank 0's gradients of iteration 4 become nan
    MLITE_FAULT=save.after_share:0:exit     rank 0 leaves after writing its share of a checkpoint

points   init                   the ranks have met, the process group comes
         tokenizer              this rank builds its tokenizer, while others wait for it
         load                   it verifies its share of the checkpoint to load, likewise
         data                   this rank opens its data, while others wait for it
         start                  data, model and checkpoint are open, no step yet
         step<N>                iteration N (from 1) begins
         step<N>.forward        a stage's first forward of it
         step<N>.loss           the last stage has the loss of its first micro batch
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
         busy<seconds>          compute so long
         error<code>            raise the failure of that exit code (2 to 7)
         bug                    raise an unexpected RuntimeError
         nan spike              at step<N>.loss the loss becomes nan or grows a thousandfold; at
                                step<N>.gradient the gradients do, of all ranks, because they are
                                summed; at step<N>.reduce perhaps only this rank's copy
         nan=<name>             only the gradient of blocks.0.mlp.up.weight, for instance
         flip=<name>            one bit of this rank's copy of that weight turns over; or of
                                master.<name>, exp_avg.<name>, as in a checkpoint
         slow<seconds>          sleep so long, every time the point is passed

step* instead of step<N> is every iteration.  Each fault but slow happens once in a process; with
`:once` behind the action not after a restart of the ranks by torchrun; with -again (nan-again,
spike-again, nan-again=<name>) in each try of its iteration: a bug that a replay meets again, where
the plain one is a passing fault of the machine.

Unset, it costs one call of an empty function at the points outside the step and before the reduction;
the other points inside a step are hooks that are then not installed.
"""

from __future__ import annotations

import math
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from megatron_lite.config import errors
from megatron_lite.config.errors import ConfigError
from megatron_lite.layers.outputs import Outputs
from megatron_lite.pipeline.stage import LossFunction, MicroBatch, Scored
from megatron_lite.train.run import Run

IN_STEP = ("step", "forward", "loss", "backward", "gradient", "reduce")
_NUMBERS = ("loss", "gradient", "reduce")
"""Points at which loss or gradients can be spoiled."""
OUTSIDE = (
    "tokenizer", "init", "load", "data", "start", "evaluate",
    "save.begin", "save.after_share", "save.before_complete", "save.end",
)  # fmt: skip
SIGNALS = ("sigkill", "sigstop", "sigterm", "sigint")
RAISED = {
    2: errors.ConfigError, 3: errors.DataError, 4: errors.CheckpointError, 5: errors.StorageError,
    6: errors.DistributedError, 7: errors.NumericsError,
}  # fmt: skip


FACTORS: Mapping[str, float] = MappingProxyType({"nan": math.nan, "spike": 1e3})


class NoFaults:
    """Default: no fault is injected."""

    def attach(self, run: Run) -> None:
        """There is nothing to install."""

    def at(self, point: str) -> None:
        """Default: no fault."""


@dataclass(slots=True)
class Fault:
    """One fault of this rank.  step: None at points outside a step, 0 in every step.

    target: the tensor to spoil; "" for all.  again: in each try of the step.
    """

    point: str
    step: int | None
    action: str
    target: str = ""
    again: bool = False
    happened: bool = False
    run: Run | None = field(default=None, repr=False)

    def attach(self, run: Run) -> None:
        """Install the points inside a step."""
        self.run = run
        if self.point == "forward":
            for stage in run.pipeline.stages.values():
                stage.module.register_forward_pre_hook(self._hook("forward"))
        elif self.point == "loss":
            for stage in run.pipeline.stages.values():
                stage.score = self._spoiling(stage.score)
        elif self.point == "backward":
            for stage in run.pipeline.stages.values():
                stage.module.register_full_backward_pre_hook(self._hook("backward"))
        elif self.point == "gradient":
            run.pipeline.begin_last_backward = self._before(
                run.pipeline.begin_last_backward, "gradient"
            )
        elif self.point == "reduce":
            run.before_reduce = self._hook("reduce")

    def _hook(self, point: str) -> Callable[..., None]:
        return lambda *_: self.at(point)

    def _before(self, call: Callable[..., Any], point: str) -> Callable[..., Any]:
        def both(*args: Any, **kwargs: Any) -> Any:
            self.at(point)
            return call(*args, **kwargs)

        return both

    def _spoiling(self, score: LossFunction) -> LossFunction:
        def spoiled(outputs: Outputs, batch: MicroBatch) -> Scored:
            scored = score(outputs, batch)
            if not self._is_due("loss"):
                return scored
            if self.action not in FACTORS:
                self._act()
                return scored
            return replace(scored, total=scored.total * FACTORS[self.action])

        return spoiled

    def at(self, point: str) -> None:
        """Go wrong, if this is the place."""
        if self._is_due(point):
            self._act()

    def _is_due(self, point: str) -> bool:
        """Whether the fault happens here and now; if so it has happened."""
        if self.happened or point != self.point:
            return False
        if self.step:
            assert self.run is not None, "attach(run) comes first"
            if self.run.progress.step + 1 != self.step:
                return False
        self.happened = not self.again
        return True

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
        elif what.startswith("busy"):
            _compute(float(what.removeprefix("busy")))
        elif what.startswith("slow"):
            _sleep(float(what.removeprefix("slow")))
        elif what in FACTORS:
            self._spoil_gradients(FACTORS[what])
        elif what == "flip":
            self._flip()
        elif what == "bug":
            raise RuntimeError("a bug on purpose (MLITE_FAULT)")
        else:
            raise RAISED[int(what.removeprefix("error"))]("on purpose (MLITE_FAULT) - unset it")

    def _spoil_gradients(self, factor: float) -> None:
        assert self.run is not None
        for piece in self.run.engine.gradients(owned=False):
            if self.target in ("", piece.name):
                piece.data.add_(1.0).mul_(factor)

    def _flip(self) -> None:
        """Turn the highest bit of the significand of the tensor's middle element over."""
        assert self.run is not None
        engine = self.run.engine
        for piece in (*engine.weights(owned=False), *engine.state(owned=False)):
            if piece.name == self.target and piece.data.numel():
                four = piece.data.element_size() == 4
                bits = piece.data.view(-1).view(torch.int32 if four else torch.int16)
                bits[bits.numel() // 2] ^= 1 << (22 if four else 6)


def _compute(seconds: float) -> None:
    """Processor time of this thread, in one stretch."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


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
    inside = re.fullmatch(r"step(\d+|\*)(?:\.(\w+))?", point)
    name = (inside[2] or "step") if inside else point
    if name not in (IN_STEP if inside else OUTSIDE):
        raise _wrong(text, f"{point!r} is no point; choose step<N>, {_listed(IN_STEP[1:])} or one of "
                     f"{', '.join(OUTSIDE)}")  # fmt: skip
    if not number.isdigit() or int(number) >= world_size:
        raise _wrong(text, f"{number!r} is no rank of {world_size}, counted from 0")
    verb, _, target = action.partition("=")
    again = verb.endswith("-again")
    verb = verb.removesuffix("-again")
    known = re.fullmatch(
        r"exit|hang|bug|nan|spike|flip|(sleep|slow|busy)\d+(\.\d+)?|error[2-7]", verb
    )
    if verb not in SIGNALS and not known:
        raise _wrong(text, f"{action!r} is no action; choose {', '.join(SIGNALS)}, exit, hang, "
                     "sleep<seconds>, slow<seconds>, busy<seconds>, error<2 to 7>, bug, nan, spike, "
                     "flip=<name>")  # fmt: skip
    if verb in FACTORS and name not in _NUMBERS:
        raise _wrong(text, f"{verb} is for {_listed(_NUMBERS)}")
    if (verb == "flip") > bool(target) or target and verb not in ("flip", *FACTORS):
        raise _wrong(text, f"{verb} names {'a' if verb == 'flip' else 'no'} tensor after =")
    if int(number) != rank or (attempt and text.endswith(":once")):
        return NoFaults()
    step = (0 if inside[1] == "*" else int(inside[1])) if inside else None
    return Fault(name, step, verb, target, again or verb.startswith("slow"))


def _wrong(text: str, why: str) -> ConfigError:
    return ConfigError(f"MLITE_FAULT={text!r} in the environment: {why} - or unset it")


def _listed(points: tuple[str, ...]) -> str:
    return ", ".join(f"step<N>.{point}" for point in points)
