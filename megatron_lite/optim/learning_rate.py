"""Learning rate and weight decay as functions of samples; Megatron's curves, no torch.

    lr
    |    /----\\                 warm-up: linear from --lr-warmup-init to --lr
    |   /      \\__              then constant, linear, cosine, inverse-square-root or WSD
    |  /          \\________     after the decay: --min-lr
    +-----------------------> samples of successful steps

--lr-restarts N divides a cosine's decay into N + 1 equal cycles, each from --lr to --min-lr.

The counter is the number of samples of *successful* steps (a step skipped by fp16 does not move
it).  A step uses the value at the samples before it, so the very first step has lr 0 after a
warm-up from 0; the log shows the value at the samples after it.  Both are Megatron's conventions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from megatron_lite.config.errors import ConfigError, all_together
from megatron_lite.config.sections.optim import LearningRateConfig, OptimConfig
from megatron_lite.config.sections.train import TrainConfig

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
FinalStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
SamplesAfter: TypeAlias = Callable[[int], int]
"""Samples of the first so many steps: what iterations mean under the run's batch schedule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRateSchedule:
    """lr(samples): warm-up, then a decay; all counters in samples."""

    max_lr: float
    min_lr: float
    style: DecayStyle
    decay_samples: float
    warmup_samples: float = 0.0
    warmup_init: float = 0.0
    wsd_style: FinalStyle = "exponential"
    wsd_samples: float = 0.0
    restarts: int = 0

    @classmethod
    def from_config(
        cls, lr: LearningRateConfig, train: TrainConfig, samples_after: SamplesAfter
    ) -> LearningRateSchedule:
        """What is given in iterations becomes the samples of just these steps.

        A fraction is one of the decay's samples.  Raises ConfigError with every value that cannot
        make a curve.
        """
        decay, warmup, wsd = _in_samples(lr, train, samples_after)
        if lr.lr_warmup_fraction is not None:
            warmup = lr.lr_warmup_fraction * decay
        problems = _problems(lr, decay=decay, warmup=warmup, wsd=wsd)
        shortest = (decay - warmup) / (lr.lr_restarts + 1)
        if lr.lr_restarts and shortest < 2 * samples_after(1):
            problems.append(
                f"--lr-restarts {lr.lr_restarts} makes cycles of {shortest:g} samples, less than two "
                f"steps of {samples_after(1)}; lower it"
            )
        if problems:
            raise all_together(problems, "with the learning rate")
        assert lr.lr is not None, "a missing --lr is one of the problems"
        return cls(
            max_lr=lr.lr,
            min_lr=lr.min_lr,
            style=lr.lr_decay_style,
            decay_samples=decay,
            warmup_samples=warmup,
            warmup_init=lr.lr_warmup_init,
            wsd_style=lr.lr_wsd_decay_style,
            wsd_samples=wsd,
            restarts=lr.lr_restarts,
        )

    def bends(self) -> list[float]:
        """Samples where the curve changes its course, in order: ends of warm-up, cycles and decay."""
        if self.style == "constant":
            return [self.warmup_samples]
        within = []
        if self.style == "WSD":
            within = [self.decay_samples - self.wsd_samples]
        cycles, length = self.restarts + 1, self.decay_samples - self.warmup_samples
        within += [self.warmup_samples + length * k / cycles for k in range(1, cycles)]
        return [self.warmup_samples, *within, self.decay_samples]

    def decoupled(self, lr: LearningRateConfig) -> LearningRateSchedule | None:
        """The same curve between --decoupled-lr and --decoupled-min-lr; None where it is not asked for."""
        if lr.decoupled_lr is None:
            return None
        least = self.min_lr if lr.decoupled_min_lr is None else lr.decoupled_min_lr
        return replace(self, max_lr=lr.decoupled_lr, min_lr=least)

    def at(self, lr_samples: int) -> float:
        """Learning rate after that many samples of successful steps."""
        n = lr_samples
        if self.warmup_samples > 0 and n <= self.warmup_samples:
            return self.warmup_init + (self.max_lr - self.warmup_init) * n / self.warmup_samples
        if self.style == "constant":
            return self.max_lr
        if n > self.decay_samples:
            return self.min_lr
        if self.style == "inverse-square-root":
            warmup = max(self.warmup_samples, 1.0)
            return max(self.min_lr, self.max_lr * math.sqrt(warmup) / math.sqrt(max(n, 1)))
        return self.min_lr + (self.max_lr - self.min_lr) * self._remaining(n)

    def _remaining(self, n: int) -> float:
        """Share of max_lr - min_lr still there, 1 to 0."""
        if self.style == "WSD":
            past = n - (self.decay_samples - self.wsd_samples)
            return 1.0 if past <= 0 else _wsd_remaining(self.wsd_style, past / self.wsd_samples)
        done = (n - self.warmup_samples) / (self.decay_samples - self.warmup_samples)
        if self.style == "cosine":
            return 0.5 * (math.cos(math.pi * self._of_the_cycle(n)) + 1.0)
        return 1.0 - done

    def _of_the_cycle(self, n: int) -> float:
        """Share of n's cycle that is over; a cycle's end is the next one's start, the last one's the end."""
        length = self.decay_samples - self.warmup_samples
        if n >= self.decay_samples:
            return 1.0
        # multiplied first: whole numbers, so that no rounding puts a restart into the cycle before it
        return (n - self.warmup_samples) * (self.restarts + 1) % length / length


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightDecaySchedule:
    """Weight decay as a function of samples: constant, or from start to end over the whole run."""

    start: float
    end: float
    style: Literal["constant", "linear", "cosine"]
    samples: float

    @classmethod
    def from_config(
        cls, optim: OptimConfig, train: TrainConfig, samples_after: SamplesAfter
    ) -> WeightDecaySchedule:
        """Raises ConfigError where a style that moves has no start or no end."""
        samples = float(train_samples(train, samples_after))
        style = optim.weight_decay_incr_style
        start, end = optim.start_weight_decay, optim.end_weight_decay
        if style == "constant":
            for flag, value in (("start", start), ("end", end)):
                if value is not None and value != optim.weight_decay:
                    raise ConfigError(
                        f"--{flag}-weight-decay {value} contradicts --weight-decay "
                        f"{optim.weight_decay} with --weight-decay-incr-style constant; "
                        f"choose --weight-decay-incr-style linear or cosine"
                    )
            wd = optim.weight_decay
            return cls(start=wd, end=wd, style=style, samples=samples)
        if start is None or end is None or start < 0 or end < start:
            raise ConfigError(
                f"--weight-decay-incr-style {style} needs 0 <= --start-weight-decay <= "
                f"--end-weight-decay; they are {start} and {end}"
            )
        return cls(start=start, end=end, style=style, samples=samples)

    def at(self, lr_samples: int) -> float:
        """Weight decay after that many samples of successful steps."""
        if self.style == "constant" or lr_samples > self.samples:
            return self.end
        done = lr_samples / self.samples
        if self.style == "cosine":
            done = 0.5 * (math.cos(math.pi * (1.0 - done)) + 1.0)
        return self.start + (self.end - self.start) * done


def train_samples(train: TrainConfig, samples_after: SamplesAfter) -> int:
    """Length of the run in samples: as given, or those of its iterations."""
    if train.samples_asked is not None:
        return train.samples_asked
    if train.train_iters is None:
        raise ConfigError(
            "the length of the run is not known; give --train-iters, --train-samples or --train-epochs"
        )
    return samples_after(train.train_iters)


def _in_samples(
    lr: LearningRateConfig, train: TrainConfig, samples_after: SamplesAfter
) -> tuple[int, float, int]:
    """Decay, warm-up and WSD's last part, given in the run's own unit, in samples."""
    length = train_samples(train, samples_after)
    if train.samples_asked is not None:
        decay = length if lr.lr_decay_samples is None else lr.lr_decay_samples
        return decay, lr.lr_warmup_samples, lr.lr_wsd_decay_samples or 0
    steps = train.train_iters if lr.lr_decay_iters is None else lr.lr_decay_iters
    assert steps is not None, "train_samples wants one of the two"
    decay, wsd = samples_after(steps), lr.lr_wsd_decay_iters or 0
    # WSD's part is the last of the decay, where the batch may be larger than at the start
    last = decay - samples_after(max(0, steps - wsd)) if wsd <= steps else samples_after(wsd)
    return decay, samples_after(lr.lr_warmup_iters), last


def _wsd_remaining(style: FinalStyle, done: float) -> float:
    """Share still there in WSD's last part, `done` going from 0 to 1."""
    if style == "linear":
        return 1.0 - done
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * done) + 1.0)
    if style == "exponential":
        return float(2.0 * 0.5**done) - 1.0
    return 1.0 - math.sqrt(done)


def _problems(lr: LearningRateConfig, *, decay: float, warmup: float, wsd: float) -> list[str]:
    """What cannot make a curve, in the flags' words."""
    found = []
    if lr.lr is None:
        found.append("--lr is missing; give the peak learning rate, e.g. --lr 6.0e-5")
    elif not 0.0 <= lr.min_lr <= lr.lr:
        found.append(f"--min-lr {lr.min_lr} is not between 0 and --lr {lr.lr}")
    if lr.lr is not None and not 0.0 <= lr.lr_warmup_init <= lr.lr:
        found.append(f"--lr-warmup-init {lr.lr_warmup_init} is not between 0 and --lr {lr.lr}")
    if decay <= 0:
        found.append(
            f"the decay is {decay:g} samples long; raise --lr-decay-iters or --train-iters"
        )
    elif not 0 <= warmup < decay:
        found.append(
            f"the warm-up of {warmup:g} samples does not end before the decay of {decay:g} samples "
            f"does; lower --lr-warmup-iters, -samples or -fraction, or raise --lr-decay-iters"
        )
    if lr.lr_decay_style == "WSD" and not 0 < wsd <= decay:
        found.append(
            f"--lr-decay-style WSD needs a last part of 1 to {decay:g} samples; it is {wsd:g}: "
            f"set --lr-wsd-decay-iters or --lr-wsd-decay-samples"
        )
    return found
