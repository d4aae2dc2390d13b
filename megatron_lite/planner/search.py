"""The fastest layouts of a run that fit its machines.

Best first: every layout has a lower bound of its step time, and what has the least is looked at next: made
precise, weighed, simulated.  What has been simulated when its turn comes is faster than all that is left, so
that layouts come out sorted by what they are said to take, and what is never looked at is slower.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from types import MappingProxyType
from typing import NamedTuple

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.planner.cost import Costs
from megatron_lite.planner.forecast import Forecast, forecast, least_seconds, step_time
from megatron_lite.planner.hardware import Cluster
from megatron_lite.planner.memory import PlanInputs, memory, static_total
from megatron_lite.planner.space import (
    Choices,
    LayoutVariant,
    layouts,
    recomputations,
    shardings,
)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """ranked: the fastest that fit, best first, all simulated.  The numbers count layouts with their
    micro batch sizes, each with any sharding and recomputation."""

    ranked: tuple[Forecast, ...]
    num_too_large: int
    num_forbidden: int
    num_slower: int
    """Those that take longer than the last of `ranked`, by their bounds, whether they fit or not."""
    closest: Forecast | None
    """Where nothing fits: the layout that misses by least."""


class _Row(NamedTuple):
    """A layout and a micro batch size, with a sharding, recomputing nothing, or as it is fixed."""

    number: int
    blueprint: Blueprint
    asked: PlanInputs


def search(
    variant: LayoutVariant,
    asked: PlanInputs,
    cluster: Cluster,
    *,
    model: ModelConfig,
    fixed: Mapping[str, str] = MappingProxyType({}),
    top: int,
    among: Callable[[ParallelConfig, int], bool] = lambda layout, micro_batch_size: True,
) -> SearchResult:
    """The `top` fastest of every tp, sp, pp, chunks, schedule, micro batch, sharding and recomputation.

    Of a layout with its micro batch size there is the fastest sharding and recomputation that fits.  fixed:
    those of SEARCHED that stay as asked, with their flags; a part of a schedule, or of recomputation,
    fixes all of it.  among: which layouts, with which micro batch size, are looked at.
    """
    looking = _Search(variant, asked, cluster, frozenset(fixed))
    looking.begin(model, among)
    ranked = tuple(islice(looking.in_order(), top))
    if not looking.rows and not looking.forbidden:
        raise ConfigError(
            f"--search: no layout on {cluster.world_size} devices, {cluster.devices_per_node} a node, is as "
            f"{' '.join(fixed.values())} say; leave some of them to the search"
        )
    closest = looking.closest if not ranked else None
    return SearchResult(
        ranked=ranked,
        num_too_large=looking.too_large,
        num_forbidden=looking.forbidden,
        num_slower=looking.rows - looking.too_large - len(ranked),
        closest=forecast(*closest, cluster, simulated=False) if closest else None,
    )


class _Search:
    """What is left to look at, by its lower bound, and what of each row comes next."""

    def __init__(
        self, variant: LayoutVariant, asked: PlanInputs, cluster: Cluster, fixed: frozenset[str]
    ) -> None:
        self.variant, self.asked, self.cluster, self.fixed = variant, asked, cluster, fixed
        self.rows = self.too_large = self.forbidden = 0
        self.least = math.inf
        self.closest: tuple[Blueprint, PlanInputs] | None = None
        self.hopeful: dict[int, int] = {}
        """Number of a row -> its shardings that have not been found too large."""
        self.listed: set[int] = set()
        self._left: list[tuple[float, int, _Row, _Next]] = []
        self._numbers = count()

    def begin(self, model: ModelConfig, among: Callable[[ParallelConfig, int], bool]) -> None:
        """All layouts, by the time of their pipelines alone."""
        drawn: dict[tuple[object, ...], Blueprint] = {}
        for layout, micro_batch_size in layouts(self.asked, self.cluster, model, self.fixed):
            if not among(layout, micro_batch_size):
                continue
            # what is split along the sequence changes no stage and no schedule
            key = (layout.tp, layout.pp, layout.pipeline_schedule,
                   layout.num_virtual_stages_per_pipeline_rank, micro_batch_size)  # fmt: skip
            try:
                blueprint = drawn[key] if key in drawn else self.variant(layout, micro_batch_size)
            except ConfigError:
                self.forbidden += 1
                continue
            drawn[key] = blueprint
            kept = dataclasses.replace(
                self.asked, parallel=layout, micro_batch_size=micro_batch_size
            )
            shared = [
                dataclasses.replace(kept, parallel=first)
                for sharded in shardings(
                    layout, blueprint.replicas, self.asked.parallel, self.fixed
                )
                for first in next(recomputations(sharded, 1, self.fixed)).layouts
            ]
            costs = Costs(blueprint, shared[0], self.cluster)
            bound = least_seconds(costs, blueprint.microbatches(), rough=True)
            for asked in shared:
                self._push(bound, _Row(self.rows, blueprint, asked), self._bounded)
            self.hopeful[self.rows] = len(shared)
            self.rows += 1

    def in_order(self) -> Iterator[Forecast]:
        """What fits, the fastest first."""
        while self._left:
            _, _, row, then = heapq.heappop(self._left)
            if row.number in self.listed:
                continue  # with what is faster
            plan = then(row)
            if plan is not None:
                self.listed.add(row.number)
                yield plan

    def _push(self, bound: float, row: _Row, then: _Next) -> None:
        heapq.heappush(self._left, (bound, next(self._numbers), row, then))

    def _bounded(self, row: _Row) -> None:
        """The whole step's lower bound."""
        costs = Costs(row.blueprint, row.asked, self.cluster)
        self._push(step_time(costs, simulated=False).total, row, self._weighed)

    def _weighed(self, row: _Row) -> None:
        """The cheapest of each way to recompute that fits."""
        ends = {0, row.blueprint.grid.pp - 1}
        static = max(static_total(row.blueprint, row.asked, rank) for rank in ends)
        fitting: list[_Row] = []
        # recomputation does not change it, and of what does not fit, what misses by least is of interest
        if static <= self.cluster.device.memory_bytes or static < self.least:
            fitting = list(self._fitting(row, ends))
        if not fitting:
            self.hopeful[row.number] -= 1
            self.too_large += self.hopeful[row.number] == 0
        for found in fitting:
            costs = Costs(found.blueprint, found.asked, self.cluster)
            self._push(step_time(costs, simulated=False).total, found, self._simulated)

    def _fitting(self, row: _Row, ends: set[int]) -> Iterator[_Row]:
        layers = max(len(stage.layers) for stage in row.blueprint.stages)
        for choices in recomputations(row.asked.parallel, layers, self.fixed):
            found = self._first(row, choices, ends)
            if found is not None:
                yield found
                if found.asked.parallel == row.asked.parallel:
                    return  # nothing is recomputed, which takes longer everywhere

    def _first(self, row: _Row, choices: Choices, ends: set[int]) -> _Row | None:
        """The first that fits."""
        first, low, high = None, 0, len(choices.layouts)
        while low < high:
            middle = (low + high) // 2 if choices.falling else low
            found = self._fits(row, choices.layouts[middle], ends)
            if found is None:
                low = middle + 1
            else:
                first, high = found, middle
        return first

    def _fits(self, row: _Row, parallel: ParallelConfig, ends: set[int]) -> _Row | None:
        """The row with this recomputed, if it fits and no rule forbids it."""
        asked = dataclasses.replace(row.asked, parallel=parallel)
        room = self.cluster.device.memory_bytes
        # the ends need most, nearly always
        needed = max(rank.total for rank in memory(row.blueprint, asked, pp_ranks=ends))
        if needed <= room:
            needed = max(rank.total for rank in memory(row.blueprint, asked))
        if needed > max(room, self.least):
            return None
        try:
            blueprint = self.variant(parallel, asked.micro_batch_size)
        except ConfigError:
            return None
        if needed > room:
            self.least, self.closest = needed, (blueprint, asked)
            return None
        self.least = 0.0
        return _Row(row.number, blueprint, asked)

    def _simulated(self, row: _Row) -> None:
        plan = forecast(row.blueprint, row.asked, self.cluster)
        if plan.fits:  # the host's memory is known by now, too
            self._push(plan.rates.step_seconds, row, lambda _: plan)


_Next = Callable[[_Row], Forecast | None]
"""What is done with a row when its bound is the least: more of it is looked at, or it is a result."""
