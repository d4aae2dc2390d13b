"""What a rank holds of a canonical tensor, beside its weight: gradient, fp32 master, optimizer state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_lite.blueprint.figure.parts import Tensor as Spec
from megatron_lite.blueprint.optimizers import LIKE_PARAMETER, State
from megatron_lite.blueprint.ownership import Rows
from megatron_lite.optim.shares import TpShare
from megatron_lite.parallel.shard import LocalParameter, NamedSlice, ParameterPiece


@dataclass(slots=True, eq=False)
class Held:
    """Rows of a canonical tensor whose gradient this rank holds, and whose update it carries out.

    weight and gradient are views of the parameter and of its accumulator; master is the weight
    itself in fp32 runs.
    """

    local: LocalParameter
    piece: ParameterPiece
    rows: Rows
    weight: Tensor
    gradient: Tensor
    master: Tensor
    state: dict[str, Tensor]
    share: TpShare

    @property
    def has_master(self) -> bool:
        """Whether the fp32 master is a tensor of its own."""
        return self.master is not self.weight

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
