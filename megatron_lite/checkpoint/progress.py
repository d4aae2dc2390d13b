"""Progress: what resuming needs besides tensors; no random state, for randomness is counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


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
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """Read back what to_json wrote; unknown keys of later versions are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})
