"""The rank grid: rank numbers, coordinates on the axes, and the groups that communicate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_lite.config.errors import ConfigError

AXES = ("tp", "cp", "dp", "pp")


class Coords(NamedTuple):
    """A rank's place on each axis."""

    tp: int = 0
    cp: int = 0
    dp: int = 0
    pp: int = 0


@dataclass(frozen=True, slots=True)
class RankGrid:
    """A box of ranks; `order` names the axes from the one that varies fastest.

    rank = tp + TP * (cp + CP * (dp + DP * pp)) in the usual order tp-cp-dp-pp, so that
    tensor-parallel ranks are neighbours on one node (Megatron's numbering).
    folded: the pipeline ends on the pp rank where it begins (zb-v).
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    order: str = "tp-cp-dp-pp"
    folded: bool = False

    def __post_init__(self) -> None:
        if sorted(self.order.split("-")) != sorted(AXES):
            raise ConfigError(f"grid order {self.order!r} must name each of {', '.join(AXES)} once")
        for axis in AXES:
            if self.size(axis) < 1:
                raise ConfigError(f"grid axis {axis} has size {self.size(axis)}; at least 1")

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tp * self.cp * self.dp * self.pp

    def size(self, axis: str) -> int:
        """Ranks along one axis, or along several joined by a dash."""
        sizes = {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}
        size = 1
        for name in axis.split("-"):
            size *= sizes[name]
        return size

    def coords(self, rank: int) -> Coords:
        """The place of a rank on each axis."""
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank {rank} is not on a grid of {self.world_size} ranks")
        place = {}
        for axis in self.order.split("-"):
            rank, place[axis] = divmod(rank, self.size(axis))
        return Coords(**place)

    def rank(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The rank at a place."""
        at = Coords(tp, cp, dp, pp)
        rank, stride = 0, 1
        for axis in self.order.split("-"):
            place = getattr(at, axis)
            if not 0 <= place < self.size(axis):
                raise ConfigError(f"{axis}={place} is not on a grid with {axis} {self.size(axis)}")
            rank += stride * place
            stride *= self.size(axis)
        return rank

    def groups(self, axes: str) -> list[tuple[int, ...]]:
        """All groups of ranks that differ only on `axes` ("tp", "tp-pp"); each rank is in one.

        Ranks ascend inside a group and groups by their first rank, alike on every rank: process
        groups must be created in one order everywhere.
        """
        return list(self._groups(axes))

    def group(self, axes: str, rank: int) -> tuple[int, ...]:
        """The group of `axes` this rank is in, ascending."""
        here = self.coords(rank)
        moving = self._moving(axes)
        spans = (
            range(self.size(axis)) if axis in moving else (place,)
            for axis, place in zip(AXES, here, strict=True)
        )
        return tuple(sorted(self.rank(**Coords(*at)._asdict()) for at in itertools.product(*spans)))

    def tied_groups(self) -> list[tuple[int, ...]]:
        """The ranks that hold one slice of a tied embedding, first stage first; one if folded."""
        ends = slice(0, 1) if self.folded else slice(None, None, max(self.pp - 1, 1))
        return [ranks[ends] for ranks in self.groups("pp")]

    def tied_group(self, rank: int) -> tuple[int, ...]:
        """The holders of this rank's slice of a tied embedding; itself alone on stages between."""
        for ranks in self.tied_groups():
            if rank in ranks:
                return ranks
        return (rank,)

    def _moving(self, axes: str) -> set[str]:
        moving = set(axes.split("-"))
        if not moving <= set(AXES):
            raise ConfigError(f"no such axes: {axes!r}; a grid has {', '.join(AXES)}")
        return moving

    def _groups(self, axes: str) -> Iterator[tuple[int, ...]]:
        seen: set[int] = set()
        for rank in range(self.world_size):
            if rank not in seen:
                ranks = self.group(axes, rank)
                seen.update(ranks)
                yield ranks
