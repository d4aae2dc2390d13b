"""What a rank holds of a canonical tensor, beside its weight: gradient, fp32 master, optimizer state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_lite.blueprint.figure.parts import Tensor as Spec
from megatron_lite.blueprint.optimizers import LIKE_PARAMETER, State
from megatron_lite.blueprint.ownership import Rows
from megatron_lite.blueprint.turns import Turns
from megatron_lite.optim.groups import Groups
from megatron_lite.optim.shares import TpShare
from megatron_lite.parallel.shard import LocalParameter, NamedSlice, ParameterPiece


@dataclass(slots=True, eq=False)
class Held:
    """Rows of a canonical tensor whose gradient this rank holds, and whose update it carries out.

    weight: a view of the parameter's rows `here`; accumulator: of all its rows, with memory while it is
    trained; own_sum: where gradients are shared, the sum over replicas of these rows; master is the weight
    itself in fp32 runs, unless it lies in host memory, as states then do (on_host).  begun: see Turns, of
    the states that are there.
    """

    local: LocalParameter
    piece: ParameterPiece
    rows: Rows
    here: slice
    weight: Tensor
    accumulator: Tensor
    master: Tensor
    share: TpShare
    turns: Turns
    own_sum: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    begun: int | None = None
    on_host: bool = False

    @property
    def gradient(self) -> Tensor:
        """What it is updated by: a view of the sums, once they are reduced."""
        return self.accumulator[self.here] if self.own_sum is None else self.own_sum

    @property
    def alone(self) -> Tensor:
        """What this rank has added before a reduction, while that has memory."""
        return self.accumulator[self.here]

    @property
    def has_master(self) -> bool:
        """Whether checkpoints hold the master: of fp32 weights it is only their values once more."""
        return self.master is not self.weight and self.weight.dtype != torch.float32

    @property
    def spec(self) -> Spec:
        """Of the canonical tensor."""
        return self.piece.spec

    def slice(
        self, data: Tensor, prefix: str, *, replicated: bool, state: State = LIKE_PARAMETER
    ) -> NamedSlice:
        """One of this rank's tensors with its place in the global one; state: what of it data is."""
        first, *others = self.piece.offset
        offset = state.at((first + self.rows.start, *others))
        name, shape = prefix + self.piece.name, state.of(self.piece.shape)
        return NamedSlice(name, shape, offset, data, replicated=replicated)


class Stateful(Protocol):
    """What has states that come and go."""

    state: dict[str, Tensor]
    begun: int | None

    @property
    def turns(self) -> Turns:
        """Which updates change it."""
        ...

    @property
    def spec(self) -> Spec:
        """Of the canonical tensor."""
        ...

    @property
    def master(self) -> Tensor:
        """What is updated."""
        ...


def fit_states(held: Iterable[Stateful], groups: Groups, steps: int) -> None:
    """Have states of what the update after so many changes, zero where it begins; none of what has no turn."""
    anew = []
    for one in held:
        begun = one.turns.begun(steps)
        if one.begun != begun:
            one.state, one.begun = {}, begun
            anew.append(one)
    for one in anew:  # now that the memory of the others is free
        if one.begun is not None:
            one.state = groups.new_state(one.spec, one.master)
