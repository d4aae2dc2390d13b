"""Matrices that tp cuts and whose rule must see them whole: each has one tp rank that updates it for all.

    shards of the gradient ── all-to-all ──▶ whole gradient ── rule ──▶ whole master and states
    shards of the weight   ◀── all-to-all ──  the master, in the weight's number format

Owners are balanced by the cost of the update.  A round has one matrix of each owner at most, so that
what is gathered at a time is a matrix and not the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from megatron_lite.blueprint.figure.parts import Tensor as Spec
from megatron_lite.blueprint.optimizers import LIKE_PARAMETER, State
from megatron_lite.blueprint.ownership import whole_owners
from megatron_lite.blueprint.turns import Turns
from megatron_lite.engines.held import Held
from megatron_lite.engines.offload import HostUpdate
from megatron_lite.optim.groups import Groups, Rates
from megatron_lite.optim.shares import TpShare
from megatron_lite.parallel.collectives import gather_to_owners, spread_from_owners
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import MASTER, NamedSlice


@dataclass(slots=True, eq=False)
class Owned:
    """A whole matrix on the rank that updates it; the gradient is there during the update alone.

    begun: see Turns, of the states that are there.
    """

    shard: Held
    master: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    begun: int | None = None
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def spec(self) -> Spec:
        """Of the canonical tensor."""
        return self.shard.spec

    @property
    def turns(self) -> Turns:
        """Of its shard."""
        return self.shard.turns

    @property
    def share(self) -> TpShare:
        """All of it."""
        return TpShare(self.spec.shape)

    @property
    def has_master(self) -> bool:
        """Whether checkpoints hold the master: in fp32 it is only the weight once more."""
        return self.shard.weight.dtype != torch.float32

    def slice(
        self, data: Tensor, prefix: str, *, replicated: bool, state: State = LIKE_PARAMETER
    ) -> NamedSlice:
        """One of its tensors, which is all of the global one."""
        shape = state.of(self.spec.shape)
        name = prefix + self.spec.name
        return NamedSlice(name, shape, (0,) * len(shape), data, replicated=replicated)


_Round = tuple[Held | None, ...]
"""The shard of each owner's matrix, in the order of the tp ranks; None where it has no more."""


class CutMatrices:
    """The matrices of one rank's shards; every tp rank makes the same calls in the same order."""

    def __init__(
        self, shards: Sequence[Held], ctx: ParallelContext, groups: Groups, host: HostUpdate
    ) -> None:
        self.ctx, self.groups, self._host = ctx, groups, host
        costs = [groups.treatment(held.spec).cost(held.spec.shape) for held in shards]
        dealt: list[list[Held]] = [[] for _ in range(ctx.tp.size)]
        for held, owner in zip(shards, whole_owners(costs, ctx.tp.size), strict=True):
            dealt[owner].append(held)
        for of_one in dealt:  # alike ones meet in a round
            of_one.sort(key=lambda held: -held.weight.numel())
        self._rounds: list[_Round] = list(zip_longest(*dealt))
        self.owned = [self._own(held) for held in dealt[ctx.tp.rank]]

    def _own(self, shard: Held) -> Owned:
        shape = shard.spec.shape
        if shard.on_host:
            return Owned(shard, self._host.master(shape))
        return Owned(shard, shard.weight.new_empty(shape, dtype=torch.float32))

    def follow(self, *, masters: bool) -> None:
        """Masters become the weights.  masters: those that checkpoints hold have been written already."""
        for position, of_round in enumerate(self._rounds):
            whole = self._gather(of_round, lambda held: held.weight)
            if whole is not None and not (masters and self.owned[position].has_master):
                self.owned[position].master.copy_(whole)

    def update(self, rates: Rates, *, steps: int, taken: Tensor | None) -> None:
        """One update of all that trains after so many; weights follow.  Collective over tp."""
        for position, of_round in enumerate(self._rounds):
            trained = tuple(
                held if held and held.turns.trains(steps) else None for held in of_round
            )
            if not any(trained):
                continue
            whole = self._gather(trained, lambda held: held.gradient)
            if whole is None:
                self._spread(trained, None)
                continue
            own = self.owned[position]
            with self._host.there(own.shard.on_host):
                own.gradient = whole.to(own.master.device)
                groups = self.groups.trained([own], steps)
                self.groups.update(groups, rates, steps=steps, taken=taken)
                own.gradient = whole.new_empty(0)
            self._spread(trained, own.master)

    def state(self, *, replicated: bool) -> Iterator[NamedSlice]:
        """Masters and optimizer tensors of what this rank owns, as named slices (views)."""
        for own in self.owned:
            if own.has_master:
                yield own.slice(own.master, MASTER, replicated=replicated)
            for state in self.groups.treatment(own.spec).states if own.state else ():
                data = own.state[state.name]
                yield own.slice(data, f"{state.name}.", replicated=replicated, state=state)

    def _gather(self, of_round: _Round, part: Callable[[Held], Tensor]) -> Tensor | None:
        """This rank's matrix of the round, put together from the parts of all; None without one."""
        tp = self.ctx.tp
        parts = [part(held).reshape(-1) for held in of_round if held]
        got = gather_to_owners(torch.cat(parts), tp, _sizes(of_round))
        own = of_round[tp.rank]
        if own is None:
            return None
        shards = got.view(tp.size, *own.weight.shape)
        return torch.cat(tuple(shards), dim=_cut(own))

    def _spread(self, of_round: _Round, master: Tensor | None) -> None:
        """Write the shards of the owners' masters into the weights; master: this rank's, if it has one."""
        tp, sizes = self.ctx.tp, _sizes(of_round)
        own = of_round[tp.rank]
        weight = next(held.weight for held in of_round if held)
        sent = weight.new_empty(0)
        if own is not None and master is not None:
            shards = master.chunk(tp.size, dim=_cut(own))
            sent = torch.cat([shard.reshape(-1) for shard in shards]).to(own.weight)
        got = spread_from_owners(sent, tp, sizes).split(sizes)
        for held, values in zip(of_round, got, strict=True):
            if held is not None:
                held.weight.copy_(values.view_as(held.weight))


def _sizes(of_round: _Round) -> list[int]:
    return [held.weight.numel() if held else 0 for held in of_round]


def _cut(held: Held) -> int:
    cut = held.spec.tp_dim
    assert cut is not None, held.spec
    return cut
