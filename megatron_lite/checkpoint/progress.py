"""Progress: what resuming needs besides tensors; no random state, for randomness is counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megatron_lite.checkpoint.schema import items, mapping, number, whole

_COUNTERS = (
    "step", "samples", "tokens", "lr_samples", "optimizer_steps", "skipped_steps",
    "validation_samples",
)  # fmt: skip


@dataclass(slots=True)
class Progress:
    """How far a run has come.  The one mutable noun.

    step: iterations done, skipped ones included; samples: consumed from the training set;
    lr_samples: samples of successful steps, which alone move the learning rate;
    optimizer_steps: successful updates (Adam's bias correction); loss_scale: fp16's scaler.
    recent: the last losses and gradient norms, oldest first, against which spikes are held.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    lr_samples: int = 0
    optimizer_steps: int = 0
    skipped_steps: int = 0
    validation_samples: int = 0
    loss_scale: dict[str, float] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)

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
            whole(getattr(progress, name), f"progress.{name}")
        for key, value in mapping(progress.loss_scale, "progress.loss_scale").items():
            number(value, f"progress.loss_scale.{key}")
        for key, listed in mapping(progress.recent, "progress.recent").items():
            for value in items(listed, f"progress.recent.{key}"):
                number(value, f"progress.recent.{key}")
        progress._require_sense()
        return progress

    def _require_sense(self) -> None:
        """Counters of one history; what a step may consume is not known, only that it is something."""
        left_out = self.samples - self.lr_samples  # of skipped steps
        for holds, what in (
            (self.samples >= self.step, f"{self.samples} samples"),
            (self.samples == 0 or self.step > 0, f"{self.samples} samples"),
            (self.skipped_steps <= self.step, f"{self.skipped_steps} skipped steps"),
            (
                left_out >= self.skipped_steps if self.skipped_steps else left_out == 0,
                f"{self.skipped_steps} skipped steps, {self.samples} samples and "
                f"{self.lr_samples} of them learnt from",
            ),
            (
                self.optimizer_steps + self.skipped_steps <= self.step,
                f"{self.optimizer_steps} updates and {self.skipped_steps} skipped steps",
            ),
        ):
            if not holds:
                raise ValueError(f"progress: {what} in {self.step} steps is no run's history")
