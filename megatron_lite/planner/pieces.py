"""Kernels between a layer's products: how many there are, and how many values they move.

A piece is a row of kernels/table.py that is no product.  Run by itself it is as many kernels as its
reference has operations; compiled it is one that reads its inputs and writes its outputs once.
tests/planner/test_pieces.py counts the same again on the real rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_lite.blueprint.figure.parts import Activation, Core, Matrix, Norm, Parts


@dataclass(frozen=True, slots=True)
class Moved:
    """Kernels, and the values of the run's number format that they read and write."""

    kernels: float = 0.0
    values: float = 0.0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.kernels + other.kernels, self.values + other.values)


@dataclass(frozen=True, slots=True)
class Kernels:
    """Of each element: (kernels, values) of a forward, and of a backward."""

    forward: tuple[int, float]
    backward: tuple[int, float]


KernelTable = Mapping[str, Kernels]

EAGER_KERNELS: KernelTable = {
    # its backward is one operation and two kernels: the second reads again for weight and bias
    "LayerNorm": Kernels((1, 2.0), (1, 5.0)),
    "RMSNorm": Kernels((9, 20.0), (17, 54.0)),  # in fp32, which is two values each
    "gelu": Kernels((1, 2.0), (1, 3.0)),
    "gelu_erf": Kernels((1, 2.0), (1, 3.0)),
    "swiglu": Kernels((2, 5.0), (4, 13.0)),
    # the sum; in backward what went by is added to what comes through the norm
    "add": Kernels((1, 3.0), (1, 3.0)),
    "bias": Kernels((1, 2.0), (1, 1.0)),
    "dropout": Kernels((2, 4.5), (2, 4.5)),  # besides its mask
    "rotate": Kernels((18, 24.5), (20, 26.5)),  # q, and then k, in fp32
    "split": Kernels((0, 0.0), (1, 2.0)),
}
"""Of 16-bit values."""

EAGER_FP32_KERNELS: KernelTable = {
    **EAGER_KERNELS,
    "RMSNorm": Kernels((6, 7.0), (14, 24.0)),
    "rotate": Kernels((14, 9.25), (16, 10.25)),
}

COMPILED_KERNELS: KernelTable = {
    "LayerNorm": Kernels((1, 2.0), (2, 5.0)),
    "RMSNorm": Kernels((1, 2.0), (2, 5.0)),
    "gelu": Kernels((1, 2.0), (1, 3.0)),
    "gelu_erf": Kernels((1, 2.0), (1, 3.0)),
    "swiglu": Kernels((1, 3.0), (1, 5.0)),
    "add": Kernels((1, 3.0), (1, 3.0)),
    "bias": Kernels((0, 0.0), (1, 1.0)),
    "dropout": Kernels((0, 0.0), (0, 1.0)),  # masks stay in registers
    "rotate": Kernels((1, 2.0), (0, 0.0)),  # its backward is in that of the split
    "split": Kernels((0, 0.0), (1, 2.0)),
}

FUSED_WITH_ADD = Kernels((1, 1.0), (1, 2.0))
"""What a compiled norm saves where the sum that it reads is made by the same kernel."""

MASK_KERNELS = 27
"""That make a dropout mask where nothing is compiled (kernels/random.py)."""


def kernel_table(*, compiled: bool, width: float) -> KernelTable:
    """The table for a run; width: bytes of a value."""
    if compiled:
        return COMPILED_KERNELS
    return EAGER_KERNELS if width == 2 else EAGER_FP32_KERNELS


def moved(
    layer: Parts, table: KernelTable, *, tokens: float, split: float, tp: int, mask: float | None
) -> tuple[Moved, Moved]:
    """What a layer moves in forward and in backward.

    split: tokens of the residual stream on this rank; mask: values moved to make an element of a
    mask of hidden dropout, None where nothing is dropped.
    """
    counted = _Count(table)
    norms = layer.of(Norm)
    for norm in norms:
        if norm.heads:
            counted.add(norm.function, tokens * norm.width * norm.heads / tp)
        else:
            counted.add(norm.function, split * norm.width)
    matrices = layer.of(Matrix)
    into = [matrix for matrix in matrices if matrix.into_stream]
    late = {id(matrix) for matrix in into if tp > 1}
    for matrix in into:
        counted.add("add", split * matrix.rows)
        if mask is not None:
            counted.drop(split * matrix.rows, mask, compiled=table is COMPILED_KERNELS)
    if table is COMPILED_KERNELS:
        in_stream = [norm for norm in norms if not norm.heads]
        for norm in in_stream[1:]:
            counted.fuse(split * norm.width * (not norm.beside))
    for matrix in matrices:
        if matrix.bias and id(matrix) in late:
            counted.add("bias", split * matrix.rows)
        elif matrix.bias and not matrix.frozen:
            counted.sum_of_bias(tokens * matrix.local(tp)[1])
    for activation in layer.of(Activation):
        counted.add(activation.function, tokens * activation.width / tp)
    for core in layer.of(Core):
        if core.rotated:
            counted.add("rotate", tokens * (core.queries + core.keys) / tp)
        counted.add("split", tokens * (core.queries + 2 * core.keys) / tp)
    return counted.forward, counted.backward


class _Count:
    """Adds pieces up."""

    def __init__(self, table: KernelTable) -> None:
        self.table, self.forward, self.backward = table, Moved(), Moved()

    def add(self, name: str, elements: float) -> None:
        """One more piece of so many elements."""
        piece = self.table[name]
        self.forward += Moved(piece.forward[0], piece.forward[1] * elements)
        self.backward += Moved(piece.backward[0], piece.backward[1] * elements)

    def drop(self, elements: float, mask: float, *, compiled: bool) -> None:
        """Dropout of a part on its way into the stream."""
        self.add("dropout", elements)
        if not compiled:
            self.forward += Moved(MASK_KERNELS, mask * elements)

    def fuse(self, elements: float) -> None:
        """A sum and the norm after it become one kernel; of no elements: they do not."""
        if elements:
            less = FUSED_WITH_ADD
            self.forward += Moved(-less.forward[0], -less.forward[1] * elements)
            self.backward += Moved(-less.backward[0], -less.backward[1] * elements)

    def sum_of_bias(self, elements: float) -> None:
        """The gradient of a bias that its product adds."""
        self.backward += Moved(1, elements)
