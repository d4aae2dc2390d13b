"""A run's learning rate and weight decay schedules: kept in checkpoints, compared on resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_type_hints

from megatron_lite.blueprint.batches import BatchSchedule
from megatron_lite.checkpoint.schema import mapping, number, word
from megatron_lite.config.sections.optim import LearningRateConfig, OptimConfig
from megatron_lite.config.sections.train import TrainConfig
from megatron_lite.optim.learning_rate import LearningRateSchedule, WeightDecaySchedule

Curve = TypeVar("Curve")
_MEANS: Mapping[str, str] = MappingProxyType(
    {
        "learning_rate.max_lr": "--lr",
        "learning_rate.min_lr": "--min-lr",
        "learning_rate.style": "--lr-decay-style",
        "learning_rate.decay_samples": (
            "samples until the decay ends (--lr-decay-iters or --lr-decay-samples; without them "
            "--train-iters, --train-samples or --train-epochs)"
        ),
        "learning_rate.restarts": "--lr-restarts",
        "learning_rate.warmup_samples": (
            "samples of warm-up (--lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction)"
        ),
        "learning_rate.warmup_init": "--lr-warmup-init",
        "learning_rate.wsd_style": "--lr-wsd-decay-style",
        "learning_rate.wsd_samples": (
            "samples of the final decay (--lr-wsd-decay-iters or --lr-wsd-decay-samples)"
        ),
        "decoupled.max_lr": "--decoupled-lr",
        "decoupled.min_lr": "--decoupled-min-lr (without it --min-lr)",
        "weight_decay.start": "weight decay at the start (--weight-decay, --start-weight-decay)",
        "weight_decay.end": "weight decay at the end (--weight-decay, --end-weight-decay)",
        "weight_decay.style": "--weight-decay-incr-style",
        "weight_decay.samples": "samples of the whole run (--train-iters, --train-samples or --train-epochs)",
    }
)
"""section.field of Schedules -> the flags that set it."""


@dataclass(frozen=True, slots=True)
class Schedules:
    """All curves, everything in samples: what is derived from the run's length is in them.

    decoupled: of the token embedding and the output layer, where their learning rate is another.
    """

    learning_rate: LearningRateSchedule
    weight_decay: WeightDecaySchedule
    decoupled: LearningRateSchedule | None = None

    @classmethod
    def from_config(
        cls,
        learning_rate: LearningRateConfig,
        optim: OptimConfig,
        train: TrainConfig,
        batches: BatchSchedule,
    ) -> Schedules:
        """The curves the flags ask for; batches: from where the run stands."""
        learning_rate = optim.rate(learning_rate)
        rate = LearningRateSchedule.from_config(learning_rate, train, batches.samples_after)
        decay = WeightDecaySchedule.from_config(optim, train, batches.samples_after)
        return cls(rate, decay, rate.decoupled(learning_rate))

    def decoupled_at(self, lr_samples: int) -> float | None:
        """Learning rate of embedding and output after that many samples; None where it is --lr's."""
        return None if self.decoupled is None else self.decoupled.at(lr_samples)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and words."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Schedules:
        """Read back what to_json wrote; KeyError where there is none, ValueError for anything else."""
        return cls(
            _read(LearningRateSchedule, values["learning_rate"], "learning_rate"),
            _read(WeightDecaySchedule, values["weight_decay"], "weight_decay"),
            None
            if values.get("decoupled") is None  # checkpoints of versions without it
            else _read(LearningRateSchedule, values["decoupled"], "decoupled"),
        )

    def differences(self, other: Schedules) -> list[str]:
        """`flag: this one's value -> the other's` of all that gives the two another curve."""
        mine, theirs = self._effective(), other._effective()
        return [
            f"{_MEANS[key]}: {_show(mine.get(key))} -> {_show(theirs.get(key))}"
            for key in _MEANS
            if mine.get(key) != theirs.get(key)
        ]

    def _effective(self) -> dict[str, object]:
        """The values that have a say in the curves: a constant one has no end, for example."""
        sections = self.to_json()
        values = {
            f"{s}.{name}": v for s, fields in sections.items() for name, v in (fields or {}).items()
        }
        if self.learning_rate.style == "constant":
            del values["learning_rate.decay_samples"], values["learning_rate.min_lr"]
            values.pop("decoupled.min_lr", None)
        if self.learning_rate.style != "WSD":
            del values["learning_rate.wsd_style"], values["learning_rate.wsd_samples"]
        if not self.learning_rate.warmup_samples:
            del values["learning_rate.warmup_init"]
        if self.weight_decay.style == "constant":
            del values["weight_decay.samples"]
        return values


def _read(kind: type[Curve], stored: object, name: str) -> Curve:
    """A curve with a number or a known word in every field."""
    values, hints = mapping(stored, f"schedules.{name}"), get_type_hints(kind)
    for key, hint in hints.items():
        if key in values and get_args(hint):
            word(values[key], f"schedules.{name}.{key}", get_args(hint))
        elif key in values:
            number(values[key], f"schedules.{name}.{key}")
    try:
        return kind(**{key: value for key, value in values.items() if key in hints})
    except TypeError as error:  # a field is missing
        raise ValueError(f"schedules.{name}: {error}") from None


def _show(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "not used" if value is None else str(value)
