"""How a rank's tensors are slices of the global, canonically named ones."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_lite.blueprint.figure.parts import Format
from megatron_lite.blueprint.figure.parts import Tensor as Spec
from megatron_lite.blueprint.optimizers import StateFormat
from megatron_lite.parallel.context import Axis, ParallelContext

DTYPES: dict[Format, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""Number formats by the names of config and figure."""

STATE_DTYPES: dict[StateFormat, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "uint8": torch.uint8,
}
"""Likewise, of optimizer states."""

MASTER = "master."
"""Prefix of the fp32 masters among the optimizer's named slices."""


@dataclass(frozen=True, slots=True)
class ParameterPiece:
    """Rows [start, stop) of a local parameter are the box at `offset` of a canonical tensor.

    shape: the global shape, without the padding of a vocabulary; a fused parameter (q, k and v in
    one matrix) has several pieces.
    """

    spec: Spec
    start: int
    stop: int
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def name(self) -> str:
        """Canonical."""
        return self.spec.name

    def of(self, local: Tensor) -> Tensor:
        """The rows of a tensor shaped like the local parameter (a view)."""
        return local[self.start : self.stop]

    def slice(self, local: Tensor, prefix: str = "") -> NamedSlice:
        """The same rows with their place in the global tensor."""
        return NamedSlice(prefix + self.name, self.shape, self.offset, self.of(local))

    def rows_from(self, first: int, data: Tensor) -> NamedSlice:
        """data: this rank's alone of these rows, those from the first-th on."""
        start, *others = self.offset
        offset = (start + first, *others)
        return NamedSlice(self.name, self.shape, offset, data, replicated=False)


@dataclass(frozen=True, slots=True, eq=False)
class NamedSlice:
    """This rank's tensor is the box at `offset` of the global tensor `name` of `shape`.

    replicated: every replica of the weights holds the same box; otherwise it is this rank's alone.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor
    replicated: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class LocalParameter:
    """One parameter of this rank, and what the engine and the checkpoint must know of it.

    over: the axis whose ranks hold the same weights: its gradient is summed over it, and its state
    may be shared there.
    grad_summed_over: further axes over which its gradient must be summed, because each rank has only its
    share: of the sequence, of the heads, of the layers.
    pieces leave out the padding rows of the vocabulary.
    tied_across_stages: a copy lives on another stage (tied embedding); gradients of both are summed.
    replica: the copy that norms and checkpoints do not count.
    grads_per_backward: how often one backward reports a gradient for it.
    late: its gradient is made of all backwards of a step, after them.
    """

    parameter: nn.Parameter
    pieces: tuple[ParameterPiece, ...]
    over: str = "replicas"
    grad_summed_over: tuple[str, ...] = ()
    tied_across_stages: bool = False
    replica: bool = False
    grads_per_backward: int = 1
    late: bool = False

    @property
    def spec(self) -> Spec:
        """Of the canonical tensor that it is, or of the first of those fused in it."""
        return self.pieces[0].spec

    @property
    def tp_dim(self) -> int | None:
        """The dim cut over tp, None where every tp rank holds the whole."""
        return self.spec.tp_dim

    def replicas(self, ctx: ParallelContext) -> Axis:
        """The axis `over`."""
        return ctx.named(self.over)


def is_primary_copy(local: LocalParameter, ctx: ParallelContext) -> bool:
    """Whether this rank's copy is the one that counts in sums over tp x pp and is saved in checkpoints."""
    return not local.replica and (local.tp_dim is not None or ctx.tp.rank == 0)


def weight_slices(
    parameters: Iterable[LocalParameter], ctx: ParallelContext, *, owned: bool
) -> Iterator[NamedSlice]:
    """The model's tensors as named slices (views): this rank's primary copies, or all it holds."""
    for local in parameters:
        if is_primary_copy(local, ctx) or not owned:
            for piece in local.pieces:
                yield piece.slice(local.parameter.detach())


def exact_slices(wanted: Iterable[NamedSlice], stored: Container[str]) -> list[NamedSlice]:
    """The same slices under their most exact stored names: the fp32 masters where there are any.

    fp32 runs keep no masters beside their weights, fp16 and bf16 runs do; either loads the other.
    """
    exact = []
    for piece in wanted:
        weight = piece.name.removeprefix(MASTER)
        name = MASTER + weight if MASTER + weight in stored else weight
        exact.append(replace(piece, name=name))
    return exact
