"""fp16's dynamic loss scale: halves on overflow, doubles after a quiet window (Megatron's hysteresis)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config.sections.precision import PrecisionConfig

_LARGEST = 2.0**32
"""The scale never grows beyond: an fp32 gradient times more would overflow."""


@dataclass(slots=True)
class LossScale:
    """The factor on the loss, and how it changes.  State: scale, quiet steps, tolerance, skips in a row.

    Megatron's quirk is kept: an overflow lowers the tolerance by one; while it is used up every
    overflow halves the scale, and only a growth restores it.
    """

    scale: float
    dynamic: bool
    minimum: float
    window: int
    hysteresis: int
    tolerance: int
    patience: int = 100
    quiet_steps: int = 0
    skips_in_a_row: int = 0

    @classmethod
    def from_config(cls, precision: PrecisionConfig) -> LossScale:
        """1.0 unless fp16; fixed where --loss-scale is given."""
        fixed = precision.loss_scale
        scale = (fixed or precision.initial_loss_scale) if precision.fp16 else 1.0
        return cls(
            scale=scale,
            dynamic=precision.fp16 and fixed is None,
            minimum=precision.min_loss_scale,
            window=precision.loss_scale_window,
            hysteresis=precision.hysteresis,
            tolerance=precision.hysteresis,
            patience=precision.loss_scale_patience,
        )

    def hopeless(self, *, loss_is_finite: bool) -> bool:
        """Whether one more overflow ends the run: no smaller scale is left, or none would help.

        A loss that is itself not finite overflowed in the forward, which no scale touches.
        """
        at_bottom = not self.dynamic or self.scale <= self.minimum
        return (at_bottom or not loss_is_finite) and self.skips_in_a_row + 1 >= self.patience

    def update(self, overflow: bool) -> None:
        """Move the scale after a step; every rank has the same `overflow`."""
        if overflow:
            self.skips_in_a_row += 1
            if not self.dynamic:
                return
            self.quiet_steps = 0
            self.tolerance -= 1
            if self.tolerance <= 0:
                self.scale = max(self.scale * 0.5, self.minimum)
            return
        self.skips_in_a_row = 0
        if not self.dynamic:
            return
        self.quiet_steps += 1
        if self.quiet_steps == self.window:
            self.quiet_steps = 0
            self.tolerance = self.hysteresis
            self.scale = min(self.scale * 2.0, _LARGEST)

    def state(self) -> dict[str, float]:
        """What a checkpoint must remember."""
        return {
            "scale": self.scale,
            "tolerance": self.tolerance,
            "quiet_steps": self.quiet_steps,
            "skips_in_a_row": self.skips_in_a_row,
        }

    def load(self, state: dict[str, float]) -> None:
        """Resume a checkpoint's state; a fixed scale of this command line stays."""
        if self.dynamic:
            self.scale = float(state.get("scale", self.scale))
            self.tolerance = int(state.get("tolerance", self.tolerance))
            self.quiet_steps = int(state.get("quiet_steps", 0))
            self.skips_in_a_row = int(state.get("skips_in_a_row", 0))
