"""One canonical tensor of a part: its shape, its cut, its first values, its number format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from megatron_lite.config.sections.lora import NF4_BLOCK

Kind = Literal["weight", "bias", "norm", "embedding"]
"""weight and embedding get weight decay, bias and norm do not."""

Cut = Literal["rows", "columns"]
"""Which side of a matrix tp splits: its outputs (column-parallel) or its inputs (row-parallel)."""


Init = Literal["normal", "into stream", "fan in", "ones", "zeros", "unit normal"]
"""How a tensor starts; "into stream": normal, smaller, since it is added to the residual stream (GPT-2);
"fan in": even within 1 / sqrt(inputs)."""

Format = Literal["fp32", "fp16", "bf16"]
"""Of numbers in memory."""

WeightFormat = Literal["fp32", "fp16", "bf16", "nf4"]
"""Of a weight in memory; what is nf4 is frozen, and unpacked where it is used."""

FORMAT_BYTES: Mapping[Format, int] = MappingProxyType({"fp32": 4, "fp16": 2, "bf16": 2})
"""Of one number."""

WEIGHT_BYTES: Mapping[WeightFormat, float] = MappingProxyType(
    {"fp32": 4, "fp16": 2, "bf16": 2, "nf4": 0.5 + 4 / NF4_BLOCK}
)
"""Of one number; of nf4 its code, and its share of its block's scale."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One canonical tensor of a part, and all that its place in the ranks and its update follow from.

    cuts: (axis of the rank grid, dim that it splits); every rank of the other axes has the tensor whole.
    sequence: it meets tokens that sequence parallelism splits, so that a rank's gradient is its share.
    heads: it meets heads that tp splits, with the same effect at any tp.
    stages: every stage of a pipeline has a copy, whose gradient is that stage's share.
    storage: its number format where that is not the run's, in which it is computed with all the same.
    frozen: it is never changed.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    init: Init = "normal"
    cuts: tuple[tuple[str, int], ...] = ()
    sequence: bool = False
    heads: bool = False
    stages: bool = False
    vocabulary: bool = False
    storage: WeightFormat | None = None
    frozen: bool = False

    @property
    def tp_dim(self) -> int | None:
        """The dim that is cut over tp, None where each tp rank has it whole."""
        for axis, dim in self.cuts:
            if axis == "tp":
                return dim
        return None

    def local(self, tp: int) -> tuple[int, ...]:
        """The shape on one of so many tp ranks."""
        cut = self.tp_dim
        return tuple(n // tp if dim == cut else n for dim, n in enumerate(self.shape))

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        return self.kind in ("weight", "embedding")

    def below(self, prefix: str) -> Tensor:
        """The same under a longer name."""
        return replace(self, name=prefix + self.name)
