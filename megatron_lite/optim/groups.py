"""Which parameters are updated together: those with one rule, one weight decay and one learning rate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_lite.blueprint.figure.parts import Tensor as Spec
from megatron_lite.blueprint.optimizers import StateFormat, Treatment, treatment
from megatron_lite.blueprint.turns import BlockDraw
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.rules import RULES, UpdateRule
from megatron_lite.optim.shares import TpShare, TpShares, alone


class Member(Protocol):
    """A tensor to update, or rows of one: its fp32 values, and all that is held beside them."""

    @property
    def spec(self) -> Spec:
        """The canonical tensor it belongs to."""
        ...

    @property
    def master(self) -> Tensor:
        """What is changed."""
        ...

    @property
    def gradient(self) -> Tensor:
        """Of the same shape, in any number format."""
        ...

    @property
    def state(self) -> dict[str, Tensor]:
        """What new_state gave."""
        ...

    @property
    def share(self) -> TpShare:
        """What of the whole tensor it is."""
        ...


_NARROW: dict[StateFormat, torch.dtype] = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "uint8": torch.uint8,
}  # fmt: skip
"""States in fewer bits than their master's."""

AnyMember = TypeVar("AnyMember", bound=Member)


class Rates(NamedTuple):
    """This step's; decoupled: the learning rate of tensors with a row per token, where it is another."""

    lr: float
    weight_decay: float
    decoupled_lr: float | None = None


class ParameterGroup(NamedTuple):
    """What the members of one group have in common.

    lr, weight_decay: factors on this step's; vocabulary: a row per token; begun: updates of the run
    before the first of those in a row that change them.
    """

    rule: str
    lr: float
    weight_decay: float
    vocabulary: bool
    begun: int


@dataclass(frozen=True, slots=True)
class Groups:
    """The rules of a run, each made when its first member comes."""

    optim: OptimConfig
    draw: BlockDraw | None = None
    _rules: dict[str, UpdateRule] = field(default_factory=dict)

    def treatment(self, spec: Spec) -> Treatment:
        """How a canonical tensor is updated, and which states that needs."""
        return treatment(self.optim, spec, self.draw)

    def prepare(self, spec: Spec, device: torch.device) -> None:
        """Make the rule of a tensor that some rank here updates: one that cannot run is told at once."""
        how = self.treatment(spec)
        if not how.frozen and hasattr(rule := self._rule(how.rule), "check"):
            rule.check(device)

    def new_state(self, spec: Spec, master: Tensor) -> dict[str, Tensor]:
        """State before the first update of these values, a whole tensor or rows of one."""
        self.prepare(spec, master.device)
        how = self.treatment(spec)
        return {
            state.name: master.new_zeros(
                state.of(master.shape), dtype=_NARROW.get(state.storage, master.dtype)
            )
            for state in how.states
        }

    def trained(
        self, members: Iterable[AnyMember], steps: int
    ) -> dict[ParameterGroup, list[AnyMember]]:
        """Those that the update after so many changes."""
        found: dict[ParameterGroup, list[AnyMember]] = {}
        for member in members:
            spec, how = member.spec, self.treatment(member.spec)
            begun = how.turns.begun(steps)
            if begun is not None and how.turns.trains(steps):
                group = ParameterGroup(how.rule, how.lr, how.decay(spec), spec.vocabulary, begun)
                found.setdefault(group, []).append(member)
        return found

    @property
    def waits_because(self) -> str:
        """Which rules cannot be given `taken`; "" where all can."""
        rules = [name for name, rule in self._rules.items() if not _knows(rule, "taken")]
        return f"the update rule {', '.join(rules)} takes no `taken`" if rules else ""

    def update(
        self,
        trained: Mapping[ParameterGroup, Sequence[Member]],
        rates: Rates,
        *,
        steps: int,
        taken: Tensor | None = None,
        total: Callable[[Sequence[Tensor]], None] = alone,
    ) -> None:
        """One update, in place; steps: updates of the run before this one; taken: see UpdateRule.

        A rule is told those that its parameters have taken part in.  total: see TpShares.
        """
        for group, held in trained.items():
            rule = self._rule(group.rule)
            told: dict[str, Any] = {} if taken is None else {"taken": taken}
            if _knows(rule, "shares"):
                told["shares"] = TpShares([member.share for member in held], total)
            decoupled = rates.decoupled_lr if group.vocabulary else None
            rule.update(
                [member.master for member in held],
                [member.gradient.to(member.master.dtype) for member in held],
                [member.state for member in held],
                steps=steps - group.begun,
                lr=group.lr * (rates.lr if decoupled is None else decoupled),
                weight_decay=group.weight_decay * rates.weight_decay,
                **told,
            )

    def _rule(self, name: str) -> UpdateRule:
        if name not in self._rules:
            if name not in RULES:
                raise ConfigError(
                    f"--optimizer {self.optim.optimizer} updates by the rule {name!r}, which is no row "
                    f"of RULES (it has {', '.join(RULES)}) - add one where the optimizer is added"
                )
            rule = RULES[name](self.optim)
            if not hasattr(rule, "update"):
                raise ConfigError(
                    f"--optimizer {self.optim.optimizer}: RULES makes a {type(rule).__name__} for "
                    f"{name!r}, which has no update(); see UpdateRule in megatron_lite/optim/rules.py"
                )
            self._rules[name] = rule
        return self._rules[name]


def _knows(rule: UpdateRule, argument: str) -> bool:
    """Whether it has this argument: rules from outside may not."""
    return argument in _arguments(type(rule))


@cache  # asked in every update
def _arguments(made: type[UpdateRule]) -> frozenset[str]:
    return frozenset(inspect.signature(made.update).parameters)
