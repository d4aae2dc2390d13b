"""Rules about what is updated, by which settings of its own, and when."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType

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


_BUILT_IN: tuple[str, ...] = OptimConfig.__dataclass_fields__["optimizer"].metadata["rows"]

_READERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "adam_": (
            "adam",
            "adam8bit",
            "muon",
            "galore",
            "apex-adam",
        ),  # muon and galore: of what is no matrix
        "sgd_": ("sgd",),
        "lion_": ("lion",),
        "sophia_": ("sophiag",),
        "adafactor_": ("adafactor",),
        "adam8bit_": ("adam8bit",),
        "muon_": ("muon",),
        "galore_": ("galore",),
    }
)
"""Beginning of a setting's name -> the optimizers that read it."""


def read_settings(config: RunConfig, world_size: int) -> Iterator[str]:
    """An optimizer's settings are given with it."""
    o = config.optim
    asked = set(optimizers_asked_for(o))
    if not asked <= set(_BUILT_IN):
        return  # a row of --extend may read any of them
    changed = _changed(o, OptimConfig())
    for prefix, readers in _READERS.items():
        unread = [name for name in changed if name.startswith(prefix)]
        if unread and asked.isdisjoint(readers):
            yield (
                f"{_flags(unread)} is about --optimizer {', '.join(readers)}, and --optimizer is "
                f"{o.optimizer}; drop it, or give --optimizer {readers[0]}"
            )


def drawn_blocks(config: RunConfig, world_size: int) -> Iterator[str]:
    """LISA trains some of the blocks, and nothing else says what is trained."""
    optim, layers = config.optim, config.model.num_layers
    if optim.lisa_layers is None:
        if optim.lisa_interval != OptimConfig().lisa_interval:
            yield f"--lisa-interval {optim.lisa_interval} needs --lisa-layers, the blocks of an interval"
        return
    if optim.lisa_layers >= layers:
        yield (
            f"--lisa-layers {optim.lisa_layers} of --num-layers {layers} draws all of them in each "
            f"interval; give less than {layers}, or leave it out"
        )
    if "sophiag" in optimizers_asked_for(optim):
        yield (
            "--lisa-layers: a block that begins would take steps of --optimizer sophiag before its curvature "
            "was seen; use another optimizer"
        )
    if config.lora.on:
        yield (
            "--lisa-layers and --lora-rank exclude each other: adapters are trained beside a model that "
            "stays frozen; give one"
        )


def adafactor(config: RunConfig, world_size: int) -> Iterator[str]:
    """Its relative step is its own, the learning rate as given is not."""
    o = config.optim
    asked = set(optimizers_asked_for(o))
    if "adafactor" not in asked:
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


def state_on_host(config: RunConfig, world_size: int) -> Iterator[str]:
    """What lies in host memory is updated there."""
    p = config.parallel
    if not p.optimizer_cpu_offload:
        if p.optimizer_offload_fraction != 1.0:
            yield (
                f"--optimizer-offload-fraction {p.optimizer_offload_fraction:g} needs "
                "--optimizer-cpu-offload; add it"
            )
        return
    if "apex-adam" in optimizers_asked_for(config.optim):
        yield (
            "--optimizer-cpu-offload makes the update on the host, and apex-adam is a kernel of a GPU; use "
            "--optimizer adam, whose states in checkpoints are the same"
        )


def _changed(settings: OptimConfig | LearningRateConfig, plain: object) -> list[str]:
    """Fields that differ from those of another one."""
    names = (field.name for field in dataclasses.fields(settings))
    return [name for name in names if getattr(settings, name) != getattr(plain, name)]


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
