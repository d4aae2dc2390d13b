"""Progress: what resuming needs besides tensors; no RNG state: the random generator is counter-based."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from megatron_lite.blueprint.batches import BatchSchedule
from megatron_lite.checkpoint.schema import checked_int, items, mapping, number, wholes

_COUNTERS = (
    "step", "samples", "tokens", "lr_samples", "optimizer_steps", "skipped_steps",
    "validation_samples", "inherited_steps",
)  # fmt: skip


@dataclass(slots=True)
class Progress:
    """How far a run has come.  The one mutable noun.

    step: iterations done, skipped ones included; samples: consumed from the training set;
    lr_samples: samples of successful steps, which alone move the learning rate;
    optimizer_steps: successful updates (Adam's bias correction); loss_scale: fp16's scaler.
    inherited_steps: of those updates the ones of runs before, whose optimizer state this one took over.
    recent: the last losses and gradient norms, oldest first, against which spikes are held.
    batches: [first step, samples before it, batch size] of each run of steps of one size.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    lr_samples: int = 0
    optimizer_steps: int = 0
    skipped_steps: int = 0
    validation_samples: int = 0
    inherited_steps: int = 0
    loss_scale: dict[str, float] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)
    batches: list[list[int]] = field(default_factory=list)

    def count(self, batch: int, seq_length: int, *, skipped: bool) -> None:
        """One more step, of so many samples."""
        if not self.batches or self.batches[-1][2] != batch:
            # a new list: a save in flight may hold the old one
            self.batches = [*self.batches, [self.step, self.samples, batch]]
        self.step += 1
        self.samples += batch
        self.tokens += batch * seq_length
        if skipped:
            self.skipped_steps += 1
        else:
            self.lr_samples += batch

    def as_it_is(self) -> Progress:
        """A copy, to go back to."""
        return replace(self)

    def go_back(self, before: Progress) -> None:
        """What was counted since a copy was made did not happen."""
        for entry in fields(self):
            setattr(self, entry.name, getattr(before, entry.name))

    def goes_on(self, schedule: BatchSchedule) -> BatchSchedule:
        """The batch schedule from here on, with what was done before as its past.

        From now on it is known here, too, where an older checkpoint does not say it.
        """
        taken_up = schedule.taken_up(self.batches, self.step, self.samples)
        self.batches = [list(phase) for phase in taken_up.phases() if phase.iteration < self.step]
        return taken_up

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: object) -> Progress:
        """Read back what to_json wrote; unknown keys of later versions are left out.

        Raises ValueError for what no run can come to.
        """
        values = mapping(stored, "progress")
        known = {f.name for f in fields(cls)}
        progress = cls(**{key: value for key, value in values.items() if key in known})
        for name in _COUNTERS:
            checked_int(getattr(progress, name), f"progress.{name}")
        for key, value in mapping(progress.loss_scale, "progress.loss_scale").items():
            number(value, f"progress.loss_scale.{key}")
        for key, listed in mapping(progress.recent, "progress.recent").items():
            for value in items(listed, f"progress.recent.{key}"):
                number(value, f"progress.recent.{key}")
        for phase in items(progress.batches, "progress.batches"):
            wholes(phase, "progress.batches", 3)
        progress._require_sense()
        progress._require_history()
        return progress

    def _require_history(self) -> None:
        """The batch sizes lead from the first step to this one; older versions did not keep them."""
        if not self.batches:
            return
        step, samples, size = 0, 0, 0
        for phase in [*self.batches, [self.step, self.samples, 1]]:
            samples += (phase[0] - step) * size
            if phase[0] < step or phase[1] != samples or phase[2] < 1:
                raise ValueError(f"progress: the batch sizes {self.batches} do not lead to "
                                 f"{self.samples} samples in {self.step} steps")  # fmt: skip
            step, _, size = phase

    def _require_sense(self) -> None:
        """Counters of one history; what a step may consume is not known, only that it is something."""
        left_out = self.samples - self.lr_samples  # of skipped steps
        for holds, what in (
            (self.samples >= self.step, f"{self.samples} samples"),
            (self.samples == 0 or self.step > 0, f"{self.samples} samples"),
            (
                self.tokens >= self.samples or not self.tokens,
                f"{self.samples} samples and {self.tokens} tokens",
            ),
            (self.skipped_steps <= self.step, f"{self.skipped_steps} skipped steps"),
            (
                left_out >= self.skipped_steps if self.skipped_steps else left_out == 0,
                f"{self.skipped_steps} skipped steps, {self.samples} samples and "
                f"{self.lr_samples} of them learnt from",
            ),
            (
                0 <= self.optimizer_steps - self.inherited_steps <= self.step - self.skipped_steps,
                f"{self.optimizer_steps} updates and {self.skipped_steps} skipped steps",
            ),
        ):
            if not holds:
                raise ValueError(f"progress: {what} in {self.step} steps is no run's history")
