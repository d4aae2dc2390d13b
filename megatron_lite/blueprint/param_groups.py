"""What --param-groups comes to: checked against the names of a model, and in words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Iterable, Iterator

from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.blueprint.optimizers import OPTIMIZERS, treatment
from megatron_lite.blueprint.parameters import ParamSpec
from megatron_lite.config.errors import all_together
from megatron_lite.config.param_groups import KINDS, ParamGroup, param_groups
from megatron_lite.config.sections.optim import LearningRateConfig, OptimConfig

_NEAR, _SHOWN = 3, 3


def check_groups(optim: OptimConfig, tensors: Iterable[Tensor]) -> None:
    """ConfigError where a group has no tensor that could be trained, or a rule that is not there."""
    if not optim.param_groups:
        return
    named = list(tensors)
    found = [
        problem
        for group in param_groups(tuple(optim.param_groups))
        for problem in _problems(group, named, OPTIMIZERS)
    ]
    if not found and all(treatment(optim, tensor).frozen for tensor in named):
        found = ["--param-groups freezes every tensor (lr=0): nothing is left to train"]
    if found:
        raise all_together(found, "with the groups of parameters")


def _problems(group: ParamGroup, tensors: list[Tensor], rules: Container[str]) -> Iterator[str]:
    own = [tensor for tensor in tensors if group.has(tensor.name, tensor.kind)]
    if not own:
        names = sorted({re.sub(r"\d+", "*", tensor.name) for tensor in tensors})
        near = difflib.get_close_matches(group.pattern, names, _NEAR, cutoff=0.3) or names[:_NEAR]
        yield (
            f"--param-groups {group.text}: no tensor of this model has such a name; names are like "
            f"{', '.join(near)}, kinds are kind={', kind='.join(KINDS)}"
        )
    elif all(tensor.frozen for tensor in own):
        yield (
            f"--param-groups {group.text}: what it names is frozen, {own[0].name} first; adapters' names "
            "end in lora_A, lora_B and lora_magnitude"
        )
    if group.rule is not None and group.rule not in rules:
        yield (
            f"--param-groups {group.text}: rule is one of {', '.join(OPTIMIZERS)}, as --optimizer"
        )


def group_lines(
    optim: OptimConfig, rates: LearningRateConfig | None, parameters: Iterable[ParamSpec]
) -> list[str]:
    """A line for all tensors that are updated alike, where not all follow from --optimizer alone."""
    if not optim.param_groups:
        return []
    groups: dict[str, list[ParamSpec]] = {}
    for spec in parameters:
        if not spec.replica:
            groups.setdefault(_alike(optim, rates, spec.tensor), []).append(spec)
    return [f"{words}: {_members(own)}" for words, own in groups.items()]


def _alike(optim: OptimConfig, rates: LearningRateConfig | None, tensor: Tensor) -> str:
    how = treatment(optim, tensor)
    if how.frozen:
        return "frozen"
    flag, peak = "--lr", None if rates is None else rates.lr
    if tensor.vocabulary and rates is not None and rates.decoupled_lr is not None:
        flag, peak = "--decoupled-lr", rates.decoupled_lr
    lr = f"{how.lr:g} x {flag}" + ("" if peak is None else f" = {how.lr * peak:.4g}")
    decay = how.decay(tensor)
    flag = "--weight-decay"
    if optim.weight_decay_incr_style == "constant":
        flag += f" = {decay * optim.weight_decay:.4g}"
    return f"{how.rule}, lr {lr}, weight decay {decay:g} x {flag}"


def _members(specs: list[ParamSpec]) -> str:
    more = ", ..." if len(specs) > _SHOWN else ""
    return (
        f"{len(specs)} tensors, {sum(spec.size for spec in specs):,} parameters "
        f"({', '.join(spec.name for spec in specs[:_SHOWN])}{more})"
    )
