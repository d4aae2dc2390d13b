"""What a rank holds of the parameters and of the optimizer's state, counted once per Blueprint."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from megatron_lite.blueprint.figure.parts import WeightFormat
from megatron_lite.blueprint.optimizers import gathered, state_bytes, treatment
from megatron_lite.blueprint.parameters import ParamSpec
from megatron_lite.config.sections.optim import OptimConfig


@dataclass(frozen=True, slots=True)
class Holding:
    """Of one rank, any tp and dp, that has some of the stages; replicas included.

    formats: parameters by the number format they are stored in, None for the run's; trained: likewise,
    of those that are not frozen.
    state_bytes: of optimizer state, masters apart; where ranks of dp share it, together.
    gathered: of the trained, what one tp rank updates for all, its part on this rank.
    update_flops: of the products in an update of all of it, a tp rank's share; largest: those of a
    whole tensor, and its elements, as one rank updates it.
    summed: numbers that update rules sum over tp, of all ranks of dp where they share the state.
    """

    parameters: int
    formats: Mapping[WeightFormat | None, int]
    trained: Mapping[WeightFormat | None, int]
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


def holding(
    table: Iterable[ParamSpec], stages: Collection[int], *, tp: int, optim: OptimConfig
) -> Holding:
    """What these stages hold, each tensor once: a rank that has both ends has one tied embedding."""
    held = {spec.name: spec.tensor for spec in table if spec.stage in stages}
    formats: dict[WeightFormat | None, int] = {}
    trained: dict[WeightFormat | None, int] = {}
    states = 0.0
    together, flops, largest = 0, 0.0, (0.0, 0)
    summed = 0
    for tensor in held.values():
        local, how = tensor.local(tp), treatment(optim, tensor)
        formats[tensor.storage] = formats.get(tensor.storage, 0) + math.prod(local)
        if not how.frozen:
            trained[tensor.storage] = trained.get(tensor.storage, 0) + math.prod(local)
        states += state_bytes(optim, tensor, tp)
        owned = tp > 1 and gathered(how, tensor)
        together += math.prod(local) if owned else 0
        if tensor.tp_dim is not None:
            summed += how.sums_over_tp or 0
        if how.flops is not None:
            whole = how.flops(tensor.shape)
            flops += whole / tp if owned else whole
            largest = max(largest, (whole, math.prod(tensor.shape)))
    return Holding(
        sum(formats.values()), formats, trained, states, together, flops, *largest, summed
    )
