"""What looks at a step before its update: each guard says go on, warn, skip or stop, the same on all ranks.

    forward, backward, reduce ──▶ StepNumbers ──▶ guards, in order ──▶ Verdict ──▶ apply or discard
                                  (summed over the world, so every rank judges the same numbers)

A new guard is a class with look() and note(), and one line in `guards_for`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from megatron_lite.checkpoint.progress import Progress
from megatron_lite.config.sections.guards import GuardsConfig
from megatron_lite.engines.loss_scale import LossScale


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """One step's numbers, equal on all ranks: mean loss, gradient norm, ranks with non-finite gradients.

    empty: nothing counts in the loss.  Zeros are a good step: a rehearsal has no other numbers.
    """

    loss: float
    grad_norm: float
    bad_ranks: int
    empty: bool = False

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite on every rank."""
        return math.isfinite(self.loss) and self.gradient_is_finite

    @property
    def gradient_is_finite(self) -> bool:
        """Whether every rank's gradient is, copies included."""
        return math.isfinite(self.grad_norm) and self.bad_ranks == 0


class Act(IntEnum):
    """What to do about a step, the graver the higher."""

    GO_ON = 0
    WARN = 1
    SKIP = 2
    STOP = 3


ACTS = {"warn": Act.WARN, "skip": Act.SKIP, "stop": Act.STOP}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a guard finds in a step.  what: "" where nothing need be printed; advice: what to do then.

    replay: whether the step should run again before the verdict stands.
    """

    act: Act
    what: str = ""
    advice: str = ""
    replay: bool = False


class Guard(Protocol):
    """Looks at a step; note() is called once per step, when its fate is settled."""

    def look(self, seen: StepNumbers, progress: Progress) -> Finding | None:
        """A finding, or None; changes nothing, for a step may be looked at twice."""
        ...

    def note(self, seen: StepNumbers, progress: Progress) -> None:
        """Remember what the next look needs."""
        ...


@dataclass(slots=True)
class Overflow:
    """fp16: an overflow skips the step and moves the loss scale; too many in a row end the run."""

    scaler: LossScale
    replay: bool

    def look(self, seen: StepNumbers, progress: Progress) -> Finding | None:
        """Skip silently, for it is normal; stop where it does not end."""
        if seen.finite:
            return None
        scaler = self.scaler
        if not scaler.hopeless(loss_is_finite=math.isfinite(seen.loss)):
            return Finding(Act.SKIP)
        return Finding(
            Act.STOP,
            f"{scaler.skips_in_a_row + 1} steps in a row overflowed in fp16, now at loss scale "
            f"{scaler.scale:g} with a loss of {seen.loss:g} and a gradient norm of "
            f"{seen.grad_norm:g}",
            f"the run diverges: lower --lr, or train in --bf16 (--min-loss-scale {scaler.minimum:g}, "
            f"--loss-scale-patience {scaler.patience})",
            self.replay,
        )

    def note(self, seen: StepNumbers, progress: Progress) -> None:
        """Move the scale."""
        self.scaler.update(overflow=not seen.finite)


@dataclass(slots=True)
class NonFinite:
    """A loss or gradient that is not finite, where no loss scale explains it."""

    act: Act
    replay: bool

    def look(self, seen: StepNumbers, progress: Progress) -> Finding | None:
        """Name which of the two it is; both belong to one step."""
        if seen.finite:
            return None
        return Finding(
            self.act,
            f"the loss is {seen.loss:g} and the gradient norm is {seen.grad_norm:g}"
            + (f" ({seen.bad_ranks} ranks hold such gradients)" if seen.bad_ranks else ""),
            "lower --lr, look at these samples, or skip such steps (--on-non-finite skip)",
            self.replay,
        )

    def note(self, seen: StepNumbers, progress: Progress) -> None:
        """Nothing is remembered."""


@dataclass(slots=True)
class Spike:
    """A value above `factor` times the median of the last `window` steps.

    Spikes enter the window like everything finite: a change that lasts becomes the new normal.
    The window is kept in Progress, so that it outlives a resume.
    """

    name: str
    value_of: Callable[[StepNumbers], float]
    flag: str
    factor: float
    window: int
    act: Act
    replay: bool

    def look(self, seen: StepNumbers, progress: Progress) -> Finding | None:
        """Hold the value against the median, once the window is full."""
        value, recent = self.value_of(seen), progress.recent.get(self.name, [])
        if not math.isfinite(value) or len(recent) < self.window:
            return None
        middle = statistics.median(recent[-self.window :])
        if middle <= 0.0 or value <= self.factor * middle:
            return None
        return Finding(
            self.act,
            f"the {self.name} of {value:g} is {value / middle:.3g} times the median {middle:g} of "
            f"the last {self.window} steps ({self.flag} {self.factor:g})",
            "look at these samples, lower --lr, or leave such steps out (--on-spike skip)",
            self.replay,
        )

    def note(self, seen: StepNumbers, progress: Progress) -> None:
        """Add the value to the window."""
        value = self.value_of(seen)
        if math.isfinite(value):
            recent = progress.recent.get(self.name, [])
            progress.recent[self.name] = [*recent, value][-self.window :]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gravest act any guard asks for, and all their findings."""

    act: Act = Act.GO_ON
    findings: tuple[Finding, ...] = ()

    @property
    def replay(self) -> bool:
        """Whether a guard wants to see the step again."""
        return any(finding.replay for finding in self.findings)

    @property
    def what(self) -> str:
        """The findings in words; "" where none has any."""
        return "; ".join(finding.what for finding in self.findings if finding.what)

    @property
    def advice(self) -> str:
        """What the gravest finding says to do."""
        gravest = max(self.findings, key=lambda finding: finding.act, default=None)
        return gravest.advice if gravest is not None else ""


@dataclass(frozen=True, slots=True)
class Guards:
    """The guards of a run, in order; judge() may be asked twice of a step, note() once.

    refuse_non_finite: whether no update is made where loss or gradient is not finite, so that the
    device can decide it without them.
    """

    guards: Sequence[Guard] = ()
    refuse_non_finite: bool = False

    def judge(self, seen: StepNumbers, progress: Progress) -> Verdict:
        """What to do with the step; equal on all ranks."""
        looks = [guard.look(seen, progress) for guard in self.guards]
        found = tuple(finding for finding in looks if finding is not None)
        return Verdict(max((finding.act for finding in found), default=Act.GO_ON), found)

    def note(self, seen: StepNumbers, progress: Progress) -> None:
        """The step is settled."""
        for guard in self.guards:
            guard.note(seen, progress)


def guards_for(config: GuardsConfig, scaler: LossScale, *, fp16: bool) -> Guards:
    """The guards this run asked for."""
    replay = config.rerun_mode != "disabled"
    spikes = config.rerun_mode == "validate_results"
    guards: list[Guard] = []
    if fp16:
        guards.append(Overflow(scaler, replay))
    elif config.check_for_nan_in_loss_and_grad:
        guards.append(NonFinite(ACTS[config.on_non_finite], replay))
    for name, value_of, flag, factor in (
        ("loss", _loss, "--loss-spike-factor", config.loss_spike_factor),
        ("gradient norm", _norm, "--grad-norm-spike-factor", config.grad_norm_spike_factor),
    ):
        if factor > 0.0:
            act = ACTS[config.on_spike]
            guards.append(Spike(name, value_of, flag, factor, config.spike_window, act, spikes))
    return Guards(guards, fp16 or config.check_for_nan_in_loss_and_grad)


def _loss(seen: StepNumbers) -> float:
    return seen.loss


def _norm(seen: StepNumbers) -> float:
    return seen.grad_norm
