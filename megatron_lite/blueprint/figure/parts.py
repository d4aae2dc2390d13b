"""The parts of a model: norms, matrices, attention cores, activation functions, tables; and a Figure of them.

    Figure      embedding ─▶ layer 0 ─▶ layer 1 ─▶ ... ─▶ head
    a layer     Norm  Matrix(q|k|v)  Core  Matrix(output)   Norm  Matrix(up)  Activation  Matrix(down)

Sizes are those of the whole model; `cut` says which dim tp splits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeVar

Kind = Literal["weight", "bias", "norm", "embedding"]
"""weight and embedding get weight decay, bias and norm do not."""

Cut = Literal["rows", "columns"]
"""Which side of a matrix tp splits: its outputs (column-parallel) or its inputs (row-parallel)."""


Init = Literal["normal", "into stream", "fan in", "ones", "zeros"]
"""How a tensor starts; "into stream": normal, smaller, since it is added to the residual stream (GPT-2);
"fan in": even within 1 / sqrt(inputs)."""

Format = Literal["fp32", "fp16", "bf16"]
"""Of numbers in memory."""

FORMAT_BYTES: Mapping[Format, int] = MappingProxyType({"fp32": 4, "fp16": 2, "bf16": 2})
"""Of one number."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One canonical tensor of a part, and all that its place in the ranks and its update follow from.

    cuts: (axis of the rank grid, dim that it splits); every rank of the other axes has the tensor whole.
    sequence: it meets tokens that sequence parallelism splits, so that a rank's gradient is its share.
    heads: it meets heads that tp splits, with the same effect at any tp.
    stages: every stage of a pipeline has a copy, whose gradient is that stage's share.
    storage: its number format where that is not the run's, in which it is computed with all the same.
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
    storage: Format | None = None

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


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over `width` features.

    heads: of the stream if 0, else of so many heads, each by itself and with the same weight.
    beside: it reads the same stream as the norm before it, whose part is added together with its own.
    """

    name: str
    width: int
    function: Literal["LayerNorm", "RMSNorm"]
    bias: bool
    less_one: bool = False
    """The weight is kept less one: it starts at zero."""
    heads: int = 0
    beside: bool = False

    def tensors(self) -> Iterator[Tensor]:
        """Its weight, and its bias where it has one."""
        start: Init = "zeros" if self.less_one else "ones"
        weight = Tensor(
            f"{self.name}.weight", (self.width,), "norm", start,
            sequence=not self.heads, heads=self.heads > 0,
        )  # fmt: skip
        yield weight
        if self.bias:
            yield replace(weight, name=f"{self.name}.bias", init="zeros")


@dataclass(frozen=True, slots=True)
class Matrix:
    """y = x Wᵀ + b with W: [rows, columns].

    pieces: the canonical matrices that lie in it below one another, (name, rows); each is cut over
    tp by itself.  A split output has a split bias; a row-parallel matrix adds the whole bias after
    its sum.  storage: of the weight, see Tensor.
    """

    name: str
    pieces: tuple[tuple[str, int], ...]
    columns: int
    cut: Cut
    bias: bool
    into_stream: bool = False
    storage: Format | None = None

    @property
    def rows(self) -> int:
        """Outputs."""
        return sum(rows for _, rows in self.pieces)

    @property
    def size(self) -> int:
        """Elements of W."""
        return self.rows * self.columns

    def local(self, tp: int) -> tuple[float, float]:
        """(inputs, outputs) on one of so many tp ranks."""
        if self.cut == "rows":
            return self.columns, self.rows / tp
        return self.columns / tp, self.rows

    def tensors(self) -> Iterator[Tensor]:
        """Weight, and bias where it has one, of every piece."""
        init: Init = "into stream" if self.into_stream else "normal"
        by_rows = self.cut == "rows"
        for name, rows in self.pieces:
            cuts: tuple[tuple[str, int], ...] = (("tp", 0 if by_rows else 1),)
            yield Tensor(
                f"{name}.weight", (rows, self.columns), "weight", init, cuts, storage=self.storage
            )
            if self.bias:
                cuts = cuts if by_rows else ()
                yield Tensor(f"{name}.bias", (rows,), "bias", "zeros", cuts, sequence=not by_rows)


@dataclass(frozen=True, slots=True)
class Core:
    """Attention between q, k, v and its output: `heads` queries share `kv_heads` keys and values.

    rotated: channels of a head that rotary positions turn; 0 for none.  interleaved: neighbours turn
    together, not one of each half of them.
    window: tokens that one sees, itself included; None for all before it.
    group: tokens of a group that see one another alone while training, moved by half a group in all
    heads but the first `still` (kernels/shifted.py); None without groups.
    """

    name: str
    heads: int
    kv_heads: int
    head_size: int
    rotated: int = 0
    interleaved: bool = False
    window: int | None = None
    group: int | None = None

    @property
    def still(self) -> int:
        """Heads whose groups are not moved."""
        return self.heads // 2

    def pairs(self, seq_length: int) -> float:
        """Scores of the mean head in a training sample: the square of it, or those of its groups."""
        s, group = seq_length, self.group
        if group is None:
            return float(s * s)
        moved = s * group - group * group / 2  # of both ends two quarters are missing
        return (self.still * s * group + (self.heads - self.still) * moved) / self.heads

    def seen(self, seq_length: int) -> int:
        """Most tokens that one of so many sees."""
        return seq_length if self.window is None else min(self.window, seq_length)

    @property
    def queries(self) -> int:
        """Features of q, and of the output."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Features of k, and of v."""
        return self.kv_heads * self.head_size

    def tensors(self) -> Iterator[Tensor]:
        """None."""
        return iter(())


@dataclass(frozen=True, slots=True)
class Activation:
    """A pointwise function of `width` features; a gated one reads twice as many (arXiv:2002.05202)."""

    name: str
    width: int
    function: Literal["gelu", "gelu_erf", "swiglu"]
    """A row of kernels/table.py; gelu is the tanh form."""

    @property
    def gated(self) -> bool:
        """Whether half of what it reads is a gate for the other half."""
        return self.function == "swiglu"

    @property
    def inputs(self) -> int:
        """Features it reads."""
        return self.width * (2 if self.gated else 1)

    @property
    def kept(self) -> int:
        """Features that forward keeps for backward: inputs, output, and of a gate its half way."""
        return self.inputs + self.width * (2 if self.gated else 1)

    @property
    def gradients(self) -> int:
        """Features that live only in its backward, less the output that is free by then."""
        return self.width * (3 if self.gated else 1)

    def tensors(self) -> Iterator[Tensor]:
        """None."""
        return iter(())


@dataclass(frozen=True, slots=True)
class Table:
    """Rows that are looked up, or outputs of a head.

    A vocabulary's are padded and cut over tp, others are whole on each rank.
    """

    name: str
    rows: int
    columns: int
    vocabulary: bool
    kind: Kind = "embedding"

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows * self.columns

    def local_rows(self, tp: int) -> float:
        """Rows on one of so many tp ranks."""
        return self.rows / tp if self.vocabulary else self.rows

    def tensors(self) -> Iterator[Tensor]:
        """Its weight."""
        cut = self.vocabulary
        yield Tensor(
            f"{self.name}.weight", (self.rows, self.columns), self.kind,
            cuts=(("tp", 0),) if cut else (), sequence=not cut, vocabulary=self.vocabulary,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Slowing:
    """How fast rotary frequencies fall as texts grow: two matrices, the same for all layers (CLEX).

    pairs: of rotated channels; width: hidden features.
    """

    name: str
    pairs: int
    width: int

    def tensors(self) -> Iterator[Tensor]:
        """Of its two products; the second starts at zero, which is no change of what NTK gives."""
        up = Tensor(
            f"{self.name}.up", (self.width, self.pairs), "weight", "fan in", heads=True, stages=True
        )
        yield up
        yield replace(up, name=f"{self.name}.down", shape=(self.pairs, self.width), init="zeros")


Part = Norm | Matrix | Core | Activation | Table | Slowing
PartT = TypeVar("PartT", Norm, Matrix, Core, Activation, Table, Slowing)


@dataclass(frozen=True, slots=True)
class Parts:
    """Parts in the order of the computation: a layer, or an end of the model."""

    parts: tuple[Part, ...]

    def of(self, kind: type[PartT]) -> tuple[PartT, ...]:
        """Those of one kind."""
        return tuple(part for part in self.parts if isinstance(part, kind))

    def named(self, name: str, kind: type[PartT]) -> PartT:
        """The part of this name; KeyError where there is none of that kind."""
        for part in self.of(kind):
            if part.name == name:
                return part
        raise KeyError(f"no {kind.__name__} {name} among {[part.name for part in self.parts]}")

    def tensors(self) -> Iterator[Tensor]:
        """All canonical tensors, in order."""
        for part in self.parts:
            yield from part.tensors()

    @property
    def size(self) -> int:
        """Parameters."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors())


SLOWING = "rotary"
Q_NORM, K_NORM = "attention.q_norm", "attention.k_norm"
TOKENS, POSITIONS, HEAD, FINAL_NORM = (
    "embedding.tokens", "embedding.positions", "head", "final_norm",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figure:
    """A model from its tokens to its outputs: logits, or what another head makes.

    tied: the head multiplies with the token table; `head` then holds the final norm alone.
    shared: what every stage of a pipeline has.
    """

    embedding: Parts
    layers: tuple[Parts, ...]
    head: Parts
    tied: bool
    shared: Parts = Parts(())

    def kinds(self, layers: Iterable[int]) -> list[Parts]:
        """The layers of these that differ, each once."""
        return list({id(parts): parts for parts in (self.layers[n] for n in layers)}.values())

    def total(self, value: Callable[[Parts], float], layers: Iterable[int] | None = None) -> float:
        """The sum of a value over these layers, or over all; like layers are computed once."""
        known: dict[int, float] = {}
        found: float = 0
        for parts in self.layers if layers is None else (self.layers[n] for n in layers):
            if id(parts) not in known:
                known[id(parts)] = value(parts)
            found += known[id(parts)]
        return found

    @property
    def tokens(self) -> Table:
        """The token table."""
        return self.embedding.named(TOKENS, Table)

    @property
    def positions(self) -> Table | None:
        """The table of learned positions, where there is one."""
        tables = [table for table in self.embedding.of(Table) if table.name == POSITIONS]
        return tables[0] if tables else None

    @property
    def slowing(self) -> Slowing | None:
        """What is learned of rotary frequencies, where anything is."""
        return next(iter(self.shared.of(Slowing)), None)

    @property
    def output(self) -> Table:
        """The matrix of the head: a table of its own, or the token table."""
        return self.tokens if self.tied else self.head.named(HEAD, Table)

    @property
    def final_norm(self) -> Norm:
        """The norm in front of the output matrix."""
        return self.head.named(FINAL_NORM, Norm)
