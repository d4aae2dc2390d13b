"""What tells good numbers from bad ones in a run, and what happens on bad ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardsConfig:
    """Non-finite values, spikes, replicas that drift; every rank decides alike."""

    check_for_nan_in_loss_and_grad: bool = True
    """Act when loss or gradient is not finite (fp16 lowers the loss scale instead)."""

    on_non_finite: Literal["stop", "skip"] = "stop"
    """A non-finite loss or gradient ends the run with exit code 7, or its step is left out."""

    rerun_mode: Literal["disabled", "non_finite", "validate_results"] = "non_finite"
    """Which steps run again from the same weights, to find the first bad value and to tell a hardware
    fault from a bug: none, those with non-finite values, or those with spikes too."""

    loss_spike_factor: float = 0.0
    """A loss above this many times the median of the last steps is a spike; 0: none ever is."""

    grad_norm_spike_factor: float = 100.0
    """A gradient norm above this many times the median of the last steps is a spike; 0: none ever is."""

    spike_window: int = 64
    """Steps whose median spikes are held against; nothing is a spike before there are as many."""

    on_spike: Literal["warn", "skip", "stop"] = "warn"
    """A spike is printed, or its step is left out, too, or it ends the run with exit code 7."""

    check_replicas: int | None = field(
        default=100,
        metadata={"aliases": ["--check-weight-hash-across-dp-replicas-interval"]},
    )
    """Steps between comparisons of everything that several ranks hold a copy of; 0: never."""
