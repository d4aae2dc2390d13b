"""How many samples a step takes after any number of consumed samples, and vocabulary padding.

    samples    0 ........... 61,680 ....................... 5,859,424 ........
    batch      |    16     |   32    | ...  | 1520        |      1536
    iteration  0         3855                           19802

A schedule is a handful of thresholds, so everything here is arithmetic on them, no loop over steps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_lite.config.batch_schedule import parse_schedule
from megatron_lite.config.sections.train import TrainConfig


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """The vocabulary rounded up to a multiple of divisible_by * tp, an equal share per tp rank."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


class Phase(NamedTuple):
    """A run of iterations with one batch size, and the samples before it."""

    iteration: int
    samples: int
    global_batch_size: int


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """The global batch size at any number of consumed samples, and with it what iterations mean.

    thresholds[i] is the first number of consumed samples at which sizes[i] holds; the first is 0.
    Everything given in iterations becomes samples here (`samples_after`), and back
    (`iterations_within`).  past: the steps of a resumed training, which other flags may have set;
    the schedule resumes at (iteration, samples) `done`.
    """

    thresholds: tuple[int, ...]
    sizes: tuple[int, ...]
    micro_batch_size: int
    dp: int
    past: tuple[Phase, ...] = ()
    done: tuple[int, int] = (0, 0)

    def global_batch_size(self, consumed_samples: int) -> int:
        """Samples of the step that starts after `consumed_samples`."""
        return self.sizes[bisect_right(self.thresholds, consumed_samples) - 1]

    def microbatches(self, samples: int) -> int:
        """Micro batches per dp rank of a step of so many samples."""
        return samples // (self.micro_batch_size * self.dp)

    @property
    def final_batch_size(self) -> int:
        """The size once the ramp is over."""
        return self.sizes[-1]

    def taken_up(
        self, past: Sequence[Sequence[int]], iterations: int, samples: int
    ) -> BatchSchedule:
        """The same after so many steps and samples, whatever schedule those followed.

        past: their phases; none where a checkpoint does not say.
        """
        if not past and self.samples_after(iterations) == samples:
            return self  # this schedule explains it
        if not past and iterations:
            size, larger = divmod(samples, iterations)
            border = iterations - larger
            past = [(0, 0, size)] + [(border, border * size, size + 1)] * (larger > 0)
        return replace(
            self, past=tuple(Phase(*phase) for phase in past), done=(iterations, samples)
        )

    def anew(self) -> BatchSchedule:
        """The same for a training that begins with it."""
        return replace(self, past=(), done=(0, 0))

    def phases(self) -> tuple[Phase, ...]:
        """Where the batch size changes, from the first step on.

        A step that starts below a threshold keeps its size although it ends beyond, so phases begin
        at the first step boundary at or after a threshold; one that is jumped over never occurs.
        """
        iteration, samples = self.done
        found = [*self.past]
        while True:
            at = bisect_right(self.thresholds, samples)
            size = self.sizes[at - 1]
            if not found or found[-1].global_batch_size != size:
                found.append(Phase(iteration, samples, size))
            if at == len(self.thresholds):
                return tuple(found)
            steps = -(-(self.thresholds[at] - samples) // size)
            iteration, samples = iteration + steps, samples + steps * size

    def samples_after(self, iterations: int) -> int:
        """Samples consumed by the first `iterations` steps."""
        phase = max(p for p in self.phases() if p.iteration <= iterations)
        return phase.samples + (iterations - phase.iteration) * phase.global_batch_size

    def iterations_within(self, samples: int) -> int:
        """Whole steps that fit into `samples`."""
        phases = self.phases()
        phase = max(p for p in phases if p.samples <= samples)
        return phase.iteration + (samples - phase.samples) // phase.global_batch_size


def batch_schedule(train: TrainConfig, *, seq_length: int, dp: int) -> BatchSchedule:
    """The schedule asked for: constant, --rampup-batch-size or --step-batch-size-schedule.

    Its sizes are whole micro batches: rules.check_sizes has seen to that.
    """
    if train.step_batch_size_schedule:
        steps = parse_schedule(train.step_batch_size_schedule)
        pairs = [(step.tokens // seq_length, step.size) for step in steps]
    elif train.rampup_batch_size:
        pairs = _ramp(*train.rampup_batch_size, final=_final_size(train, dp))
    else:
        pairs = [(0, _final_size(train, dp))]
    return BatchSchedule(
        thresholds=tuple(threshold for threshold, _ in pairs),
        sizes=tuple(size for _, size in pairs),
        micro_batch_size=train.micro_batch_size,
        dp=dp,
    )


def _final_size(train: TrainConfig, dp: int) -> int:
    if train.global_batch_size is None:
        return train.samples_at_once(dp)
    return train.global_batch_size


def _ramp(start: int, increment: int, samples: int, *, final: int) -> list[tuple[int, int]]:
    """Equal shares of the samples for each size below the final one."""
    num = (final - start) // increment
    pairs = [(0, start)]
    pairs += [(_first_sample(k, num, samples), start + k * increment) for k in range(1, num + 1)]
    return [
        pair
        for pair, after in zip(pairs, [*pairs[1:], None], strict=True)
        if after is None or after[0] > pair[0]
    ]


def _first_sample(step: int, steps: int, samples: int) -> int:
    """The first number of samples at which Megatron's ramp takes its `step`-th size.

    Its division is of doubles: a threshold that is a whole number may be met a sample late.
    """
    if samples == 0:
        return 0
    share = samples / steps
    first = max(0, step * samples // steps - 1)
    while int(first / share) < step and first <= samples:
        first += 1
    return first
