"""Rules about what is updated, by which settings of its own, and when."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.param_groups import optimizers_asked_for, read_group
from megatron_lite.config.sections.optim import LearningRateConfig, OptimConfig
from megatron_lite.config.sections.run import RunConfig


def groups(config: RunConfig, world_size: int) -> Iterator[str]:
    """Each of --param-groups can be read."""
    for text in config.optim.param_groups:
        try:
            read_group(text)
        except ConfigError as error:
            yield f"--param-groups {error}"


def adafactor(config: RunConfig, world_size: int) -> Iterator[str]:
    """Its settings are given with it; its relative step is its own, the learning rate as given is not."""
    o = config.optim
    try:
        asked = set(optimizers_asked_for(o))
    except ConfigError:
        return  # a group that cannot be read
    if "adafactor" not in asked:
        others = [name for name in _changed(o, OptimConfig()) if name.startswith("adafactor_")]
        if others:
            yield (
                f"{_flags(others)} is about --optimizer adafactor, and --optimizer is {o.optimizer}; "
                "drop it, or give --optimizer adafactor"
            )
        return
    if o.adafactor_warmup_init and not o.adafactor_relative_step:
        yield (
            "--adafactor-warmup-init is how the relative step begins; add --adafactor-relative-step, "
            "or warm --lr up by --lr-warmup-iters"
        )
    if o.adafactor_relative_step and asked != {"adafactor"}:
        yield (
            "--adafactor-relative-step has no learning rate for others, and "
            f"{', '.join(sorted(asked - {'adafactor'}))} updates some tensors; leave it out and give --lr"
        )
    rate = config.learning_rate
    plain = dataclasses.replace(
        LearningRateConfig(),
        override_opt_param_scheduler=rate.override_opt_param_scheduler,
        use_checkpoint_opt_param_scheduler=rate.use_checkpoint_opt_param_scheduler,
    )
    given = _changed(rate, plain) if o.adafactor_relative_step else []
    if given:
        yield (
            f"--adafactor-relative-step makes its own steps, min(1e-2, 1 / sqrt(updates)), and "
            f"{_flags(given)} would have no effect; drop one of the two"
        )


def _changed(settings: OptimConfig | LearningRateConfig, plain: object) -> list[str]:
    """Fields that differ from those of another one."""
    names = (field.name for field in dataclasses.fields(settings))
    return [name for name in names if getattr(settings, name) != getattr(plain, name)]


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
