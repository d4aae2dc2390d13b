"""Axis and ParallelContext: this rank's place in the grid and its groups; frozen, passed, never global."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_lite.blueprint.grid import RankGrid
from megatron_lite.parallel.observer import NOBODY, Observer, together


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the rank grid, seen from this rank: its place, the ranks on it, their process group.

    group is None when size == 1; collectives then return their input, so that a single process
    needs no process group at all.  observer: called around every call to these ranks.
    """

    name: str
    rank: int = 0
    size: int = 1
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    observer: Observer = field(default=NOBODY, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """All axes of this rank, and its device.

    dp: the ranks with other samples (what each reads, how many tokens count).  replicas: those with
    the same weights (who sums gradients, shares optimizer state, writes a copy): dp x cp, and the
    very axis dp where cp is 1.  model is tp x pp (gradient norm); tied joins the first and the last
    stage that hold the tied embedding (size 1 where one rank holds both, or on the stages between).
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    tp: Axis = Axis("tp")
    cp: Axis = Axis("cp")
    dp: Axis = Axis("dp")
    replicas: Axis = Axis("dp")
    pp: Axis = Axis("pp")
    model: Axis = Axis("tp-pp")
    tied: Axis = Axis("tied")
    world: Axis = Axis("world")

    @classmethod
    def serial(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """One process, no process group."""
        return cls(device=torch.device(device))

    @classmethod
    def from_grid(
        cls, grid: RankGrid, rank: int, device: torch.device, *, timeout: timedelta | None = None
    ) -> ParallelContext:
        """Make every group of the grid.  Collective over the world: every rank calls it.

        timeout: of every group's collectives; torch would give a new group its own default,
        whatever the world has.
        """
        axes = {name: _axis(grid, name, rank, timeout) for name in ("tp", "cp", "dp", "pp")}
        both = axes["dp"] if grid.cp == 1 else _axis(grid, "cp-dp", rank, timeout)
        if device.type == "cuda" and axes["pp"].size > 1:
            connect_neighbours(axes["pp"], device)
        return cls(
            device=device,
            rank=rank,
            world_size=grid.world_size,
            **axes,
            replicas=both,
            model=_axis(grid, "tp-pp", rank, timeout),
            tied=_tied(grid, rank, timeout),
            world=_world(grid, rank),
        )

    def observed(self, *observers: Observer) -> ParallelContext:
        """The same context whose axes call these observers, in this order."""
        one = together(*observers)
        return replace(self, **{name: replace(getattr(self, name), observer=one) for name in _AXES})

    def named(self, name: str) -> Axis:
        """The axis of this name among the fields."""
        found = getattr(self, name)
        assert isinstance(found, Axis), name
        return found


_AXES = ("tp", "cp", "dp", "replicas", "pp", "model", "tied", "world")
"""Fields of ParallelContext that are axes."""


def connect_neighbours(pp: Axis, device: torch.device) -> None:
    """Exchange a number with the neighbouring pipeline ranks, both ways, before the first step.

    NCCL connects two ranks, for each direction, when their first message is launched, and the host
    waits there for the partner.  A partner whose posted receive still occupies its device may be
    waiting in turn, to load a kernel that it runs for the first time: a deadlock.
    """
    # NCCL: messages between two ranks of a group come after a collective of the whole group
    dist.all_reduce(torch.zeros(1, device=device), group=pp.group)
    peers = sorted({pp.ranks[(pp.rank + step) % pp.size] for step in (1, -1)})
    mine = torch.full((1,), float(pp.ranks[pp.rank]), device=device)
    boxes = {peer: torch.empty(1, device=device) for peer in peers}
    operations = [dist.P2POp(dist.isend, mine, peer, pp.group) for peer in peers]
    operations += [dist.P2POp(dist.irecv, box, peer, pp.group) for peer, box in boxes.items()]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    for peer, box in boxes.items():
        assert box.item() == peer, (peer, box)  # waits for the device


def _axis(grid: RankGrid, axes: str, rank: int, timeout: timedelta | None) -> Axis:
    mine = Axis(axes)
    for ranks in grid.groups(axes):  # every rank makes every group, in the same order
        group = dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
        if rank in ranks:
            mine = Axis(axes, ranks.index(rank), len(ranks), tuple(ranks), group)
    return mine


def _tied(grid: RankGrid, rank: int, timeout: timedelta | None) -> Axis:
    mine = Axis("tied", ranks=(rank,))
    for ranks in grid.tied_groups():
        group = dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
        if rank in ranks:
            mine = Axis("tied", ranks.index(rank), len(ranks), ranks, group)
    return mine


def _world(grid: RankGrid, rank: int) -> Axis:
    ranks = tuple(range(grid.world_size))
    return Axis("world", rank, len(ranks), ranks, dist.group.WORLD if len(ranks) > 1 else None)
