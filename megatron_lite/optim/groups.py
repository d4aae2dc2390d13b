"""Which parameters are updated together: those with one rule, one weight decay and one learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_lite.blueprint.figure.parts import Tensor as Spec
from megatron_lite.blueprint.optimizers import Treatment, treatment
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.rules import RULES, UpdateRule


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


class Rates(NamedTuple):
    """This step's; decoupled: the learning rate of tensors with a row per token, where it is another."""

    lr: float
    weight_decay: float
    decoupled_lr: float | None = None


class Group(NamedTuple):
    """What the members of one group have in common."""

    rule: str
    decays: bool
    decoupled: bool
    first_update: int


@dataclass(frozen=True, slots=True)
class Groups:
    """The rules of a run, each made when its first member comes."""

    optim: OptimConfig
    _rules: dict[str, UpdateRule] = field(default_factory=dict)

    def treatment(self, spec: Spec) -> Treatment:
        """How a canonical tensor is updated, and which states that needs."""
        return treatment(self.optim, spec)

    def new_state(self, spec: Spec, master: Tensor) -> dict[str, Tensor]:
        """State before the first update of these values, a whole tensor or rows of one."""
        return {
            state.name: master.new_zeros(state.of(master.shape))
            for state in self.treatment(spec).states
        }

    def trains(self, spec: Spec, steps: int) -> bool:
        """Whether the update after so many changes a tensor, which needs a gradient for it."""
        return steps >= self.treatment(spec).first_update

    def update(self, members: Iterable[Member], rates: Rates, *, steps: int) -> None:
        """One update, in place, of all members that are trained by now; steps: updates before this one.

        A rule is told those that its parameters have taken part in.
        """
        groups: dict[Group, list[Member]] = {}
        for member in members:
            if not self.trains(member.spec, steps):
                continue
            groups.setdefault(self._group(member.spec, rates), []).append(member)
        for group, held in groups.items():
            lr = rates.decoupled_lr if group.decoupled else rates.lr
            assert lr is not None, "a decoupled group has its rate"
            self._rule(group.rule).update(
                [member.master for member in held],
                [member.gradient.to(member.master.dtype) for member in held],
                [member.state for member in held],
                steps=steps - group.first_update,
                lr=lr,
                weight_decay=rates.weight_decay if group.decays else 0.0,
            )

    def _group(self, spec: Spec, rates: Rates) -> Group:
        decoupled = spec.vocabulary and rates.decoupled_lr is not None
        how = self.treatment(spec)
        return Group(how.rule, spec.decays, decoupled, how.first_update)

    def _rule(self, name: str) -> UpdateRule:
        if name not in self._rules:
            self._rules[name] = RULES[name](self.optim)
        return self._rules[name]
