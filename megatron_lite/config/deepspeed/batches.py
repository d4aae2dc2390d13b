"""train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x dp, once dp is known.

Any two give the third, one of the first two gives the others with one micro batch per step, as in
DeepSpeed; what does not come out even is an error with its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_lite.config.deepspeed.key import positive
from megatron_lite.config.deepspeed.laying import Laying, SaidKey
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.run import RunConfig

TRAIN, MICRO, STEPS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
)  # fmt: skip
GLOBAL_FIELD, MICRO_FIELD = "train.global_batch_size", "train.micro_batch_size"


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """What file and flags say of the three numbers, in words too; None where neither does."""

    name: str
    train: int | None
    micro: int | None
    accumulation: int | None
    said: tuple[str, ...]
    in_samples: dict[str, int] = field(default_factory=dict)
    """section.field of samples -> steps of the file that it is to hold."""

    def on(self, config: RunConfig, world_size: int) -> tuple[RunConfig, list[str]]:
        """The config with its batch sizes on so many ranks, and a line; ConfigError for what is uneven."""
        ranks = config.parallel.ranks_per_sample
        if ranks < 1 or world_size < 1 or world_size % ranks:
            return config, []  # the rules tell
        dp = world_size // ranks
        sizes = replace(config.train, micro_batch_size=self._samples_of_one(dp))
        at_once = sizes.samples_at_once(dp)
        size = at_once * (self.accumulation or 1) if self.train is None else self.train
        self._check(size, at_once, sizes.micro_batch_size, dp)
        changed = replace(config, train=replace(sizes, global_batch_size=size))
        for key, steps in self.in_samples.items():
            section, name = key.split(".")
            part = replace(getattr(changed, section), **{name: steps * size})
            changed = replace(changed, **{section: part})
        return changed, [
            f"{self.name}: global batch {size} = micro batch {sizes.micro_batch_size} x accumulation "
            f"{size // at_once} x dp {dp}"
        ]

    def _samples_of_one(self, dp: int) -> int:
        if self.micro is not None:
            return self.micro
        assert self.train is not None, "one of the two is known"
        parts = (self.accumulation or 1) * dp
        samples, left = divmod(self.train, parts)
        if left or not samples:
            raise ConfigError(
                f"{self._said()} is no multiple of accumulation {self.accumulation or 1} x dp {dp} = {parts}"
            )
        return samples

    def _check(self, size: int, at_once: int, micro: int, dp: int) -> None:
        """ConfigError where the three numbers are no product."""
        steps = self.accumulation
        if steps is not None and size != at_once * steps:
            raise ConfigError(
                f"{self._said()} is not micro batch {micro} x accumulation {steps} x dp {dp} = "
                f"{at_once * steps}; leave one of the three out"
            )
        if size % at_once:
            raise ConfigError(
                f"{self._said()} is no multiple of micro batch {micro} x dp {dp} = {at_once}"
            )

    def _said(self) -> str:
        return f"{', '.join(self.said)}: train_batch_size {self.train}"


def batch_sizes(laying: Laying, in_samples: dict[str, int]) -> BatchSizes | None:
    """What is said of the batch; None where the file leaves it to the flags."""
    keys = [laying.said[name] for name in (TRAIN, MICRO, STEPS) if name in laying.said]
    if not keys:
        if in_samples:
            laying.problems.append(
                f"{laying.name}: the scheduler counts steps, and the batch is not known"
            )
        return None
    numbers = {key.name: _number(laying, key) for key in keys}
    for name, field_ in ((TRAIN, GLOBAL_FIELD), (MICRO, MICRO_FIELD)):
        if numbers.get(name) is not None:
            laying.give(field_, numbers[name], laying.said[name])
        elif laying.given(field_):
            value = laying.values[field_]
            assert isinstance(value, int)
            numbers[name] = value
    _check_auto(laying, numbers)
    _check_ramp(laying, numbers)
    if laying.problems and numbers.get(TRAIN) is None and numbers.get(MICRO) is None:
        return None
    if numbers.get(TRAIN) is None and numbers.get(MICRO) is None:
        laying.problems.append(
            f"{keys[0]} alone says no batch; add {TRAIN} or {MICRO}, or --micro-batch-size"
        )
        return None
    words = [str(key) for key in keys if not key.is_auto]
    words += [
        laying.flag(field_)
        for name, field_ in ((TRAIN, GLOBAL_FIELD), (MICRO, MICRO_FIELD))
        if laying.given(field_) and (name not in laying.said or laying.said[name].is_auto)
    ]
    return BatchSizes(
        laying.name,
        numbers.get(TRAIN),
        numbers.get(MICRO),
        numbers.get(STEPS),
        tuple(words),
        in_samples,
    )


def _number(laying: Laying, key: SaidKey) -> int | None:
    """The value; None where the flags are to say it, or where it is none."""
    if key.is_auto:
        return None
    try:
        return positive(key.value)
    except ValueError as error:
        laying.problems.append(f"{key.place}: {key.name} {error}")
        return None


def _check_auto(laying: Laying, numbers: dict[str, int | None]) -> None:
    """Of "auto" the micro batch is a flag's; the other two come from --global-batch-size or from each other."""
    micro, train, steps = (laying.said.get(name) for name in (MICRO, TRAIN, STEPS))
    if micro is not None and micro.is_auto and numbers.get(MICRO) is None:
        laying.from_flags(micro, [MICRO_FIELD])
    if steps is not None and steps.is_auto and numbers.get(TRAIN) is None:
        laying.from_flags(steps, [GLOBAL_FIELD])
    elif (
        train is not None
        and train.is_auto
        and numbers.get(TRAIN) is None
        and not numbers.get(STEPS)
    ):
        laying.from_flags(train, [GLOBAL_FIELD])


def _check_ramp(laying: Laying, numbers: dict[str, int | None]) -> None:
    """A batch that grows has no fixed number of micro batches."""
    for field_ in ("train.rampup_batch_size", "train.step_batch_size_schedule"):
        if laying.given(field_) and numbers.get(STEPS) is not None:
            laying.problems.append(
                f"{laying.said[STEPS]} is one number, but the batch grows with "
                f"{laying.flag(field_)}; "
                f"drop one, and say the last size with {TRAIN}"
            )
