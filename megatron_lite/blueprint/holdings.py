"""What a rank holds of the parameters and of the optimizer's state, counted once per Blueprint."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from megatron_lite.blueprint.figure.parts import Figure, WeightFormat
from megatron_lite.blueprint.optimizers import (
    OPTIMIZERS,
    check_curvature,
    check_states,
    curvature_interval,
    gathered,
    state_bytes,
    treatment,
)
from megatron_lite.blueprint.param_groups import check_groups
from megatron_lite.blueprint.parameters import ParamSpec, table_of
from megatron_lite.blueprint.stages import Placement, StageLayers
from megatron_lite.blueprint.turns import BlockDraw, OfBlock
from megatron_lite.config.sections.optim import OptimConfig


@dataclass(frozen=True, slots=True)
class Holding:
    """Of one rank, any tp and dp, that has some of the stages; replicas included.

    formats: parameters by the number format they are stored in, None for the run's; trained: likewise,
    of those that are not frozen; accumulated: most of them that have gradients in a step.
    state_bytes: of optimizer state in such a step, masters apart; where ranks of dp share it, together.
    gathered: of these, what one tp rank updates for all, its part on this rank.
    update_flops: of the products in an update of all of it, a tp rank's share; largest: those of a
    whole tensor, and its elements, as one rank updates it.
    summed: numbers that update rules sum over tp, of all ranks of dp where they share the state.
    """

    parameters: int
    formats: Mapping[WeightFormat | None, int]
    trained: Mapping[WeightFormat | None, int]
    accumulated: int
    state_bytes: float
    gathered: int = 0
    update_flops: float = 0.0
    largest_flops: float = 0.0
    largest_matrix: int = 0
    summed: int = 0

    @property
    def num_trained(self) -> int:
        """Parameters that are not frozen."""
        return sum(self.trained.values())


@dataclass(frozen=True, slots=True)
class Updates:
    """An optimizer and the rows that say how it updates: compared, not hashed, since a config holds lists."""

    optim: OptimConfig
    rows: tuple[object, ...]

    def __hash__(self) -> int:
        return hash(self.rows)

    @classmethod
    def of(cls, optim: OptimConfig) -> Updates:
        """By the rows there are now."""
        return cls(optim, tuple(OPTIMIZERS.values()))


@lru_cache(maxsize=128)  # a search asks for the same with each schedule, micro batch and sharding
def holdings(
    figure: Figure,
    stages: tuple[StageLayers, ...],
    placement: Placement,
    tp: int,
    updates: Updates,
    draw: BlockDraw | None,
) -> tuple[Holding, ...]:
    """Of each pp rank."""
    table = table_of(figure, stages)
    return tuple(
        holding(
            table,
            {stage.index for stage in stages if placement[stage.index] == pp_rank},
            tp=tp,
            optim=updates.optim,
            draw=draw,
        )
        for pp_rank in range(max(placement) + 1)
    )


@lru_cache(maxsize=128)
def curvature_every(figure: Figure, stages: tuple[StageLayers, ...], updates: Updates) -> int:
    """Every how many iterations a pass of its own observes curvature; 0: none does."""
    return curvature_interval(updates.optim, (spec.tensor for spec in table_of(figure, stages)))


@lru_cache(maxsize=128)
def check_updates(
    figure: Figure, stages: tuple[StageLayers, ...], tp: int, updates: Updates
) -> None:
    """ConfigError where the optimizer cannot update a tensor of these."""
    optim, tensors = updates.optim, [spec.tensor for spec in table_of(figure, stages)]
    check_groups(optim, tensors)
    check_states(optim, tensors, tp)
    check_curvature(optim, tensors, vocabulary=figure.output.vocabulary)


def holding(
    table: Iterable[ParamSpec],
    stages: Collection[int],
    *,
    tp: int,
    optim: OptimConfig,
    draw: BlockDraw | None = None,
) -> Holding:
    """What these stages hold, each tensor once: a rank that has both ends has one tied embedding.

    draw: which blocks are trained when; the largest of these stages' count, as many as may be at once.
    """
    held = {spec.name: spec.tensor for spec in table if spec.stage in stages}
    formats: dict[WeightFormat | None, int] = {}
    trained: dict[WeightFormat | None, int] = {}
    always, by_block = _InStep(), defaultdict[int, _InStep](_InStep)
    together, summed, largest = 0, 0, (0.0, 0)
    for tensor in held.values():
        local, how = tensor.local(tp), treatment(optim, tensor, draw)
        formats[tensor.storage] = formats.get(tensor.storage, 0) + math.prod(local)
        if how.frozen:
            continue
        trained[tensor.storage] = trained.get(tensor.storage, 0) + math.prod(local)
        in_step = by_block[how.turns.block] if isinstance(how.turns, OfBlock) else always
        in_step.elements += math.prod(local)
        in_step.state_bytes += state_bytes(optim, tensor, tp)
        owned = tp > 1 and gathered(how, tensor)
        together += math.prod(local) if owned else 0
        if tensor.tp_dim is not None:
            summed += how.sums_over_tp or 0
        if how.flops is not None:
            whole = how.flops(tensor.shape)
            in_step.flops += whole / tp if owned else whole
            largest = max(largest, (whole, math.prod(tensor.shape)))
    steps = [always, *_largest(by_block.values(), 0 if draw is None else draw.drawn)]
    return Holding(
        sum(formats.values()), formats, trained,
        sum(part.elements for part in steps),
        sum(part.state_bytes for part in steps),
        together,
        sum(part.flops for part in steps),
        *largest,
        summed,
    )  # fmt: skip


@dataclass(slots=True)
class _InStep:
    """Sums over what is trained in the same steps, as Holding has them."""

    elements: int = 0
    state_bytes: float = 0.0
    flops: float = 0.0


def _largest(blocks: Iterable[_InStep], number: int) -> list[_InStep]:
    """So many, whose gradients and states take most."""
    return heapq.nlargest(number, blocks, key=lambda block: 4 * block.elements + block.state_bytes)
