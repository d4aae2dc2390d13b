"""The parts of a model: norms, matrices, attention cores, activation functions, tables; and a Figure of them.

    Figure      embedding ─▶ layer 0 ─▶ layer 1 ─▶ ... ─▶ head
    a layer     Norm  Matrix(q|k|v)  Core  Matrix(output)   Norm  Matrix(up)  Activation  Matrix(down)

Sizes are those of the whole model; `cut` says which dim tp splits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from megatron_lite.blueprint.figure.tensor import FORMAT_BYTES as FORMAT_BYTES
from megatron_lite.blueprint.figure.tensor import WEIGHT_BYTES as WEIGHT_BYTES
from megatron_lite.blueprint.figure.tensor import Cut as Cut
from megatron_lite.blueprint.figure.tensor import Format as Format
from megatron_lite.blueprint.figure.tensor import Init as Init
from megatron_lite.blueprint.figure.tensor import Kind as Kind
from megatron_lite.blueprint.figure.tensor import Tensor as Tensor
from megatron_lite.blueprint.figure.tensor import WeightFormat as WeightFormat


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to a frozen matrix W, scale B A, with A: [rank, columns] and B: [rows, rank].

    pieces: those of its matrix that have an A and a B of their own, (name, rows).
    cut: its matrix'; A or B is cut as W is, the other is whole on every tp rank.  None: it belongs to a
    table with a row per token; A is then [columns, rank] and cut as the table is.
    magnitude: the length of each row of W + scale B A is trained by itself (arXiv:2402.09353).
    """

    name: str
    pieces: tuple[tuple[str, int], ...]
    columns: int
    cut: Cut | None
    rank: int
    scale: float
    dropout: float = 0.0
    magnitude: bool = False

    @property
    def size(self) -> int:
        """Elements of all A and B."""
        return sum(self.rank * (rows + self.columns) for _, rows in self.pieces)

    def tensors(self) -> Iterator[Tensor]:
        """A, B and the magnitude of every piece."""
        by_rows, table = self.cut == "rows", self.cut is None
        for name, rows in self.pieces:
            a, b = f"{name}.{LORA_A}", f"{name}.{LORA_B}"
            if table:
                yield Tensor(
                    a,
                    (self.columns, self.rank),
                    "embedding",
                    "zeros",
                    (("tp", 0),),
                    vocabulary=True,
                )
                yield Tensor(b, (rows, self.rank), "weight", "unit normal", sequence=True)
                continue
            cuts: tuple[tuple[str, int], ...] = () if by_rows else (("tp", 1),)
            yield Tensor(a, (self.rank, self.columns), "weight", "fan in", cuts, sequence=by_rows)
            cuts = (("tp", 0),) if by_rows else ()
            yield Tensor(b, (rows, self.rank), "weight", "zeros", cuts, sequence=not by_rows)
            if self.magnitude:
                yield Tensor(
                    f"{name}.{MAGNITUDE}", (rows,), "norm", "ones", cuts, sequence=not by_rows,
                    storage="fp32",
                )  # fmt: skip


LORA_A, LORA_B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude"


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
    frozen: bool = False

    def tensors(self) -> Iterator[Tensor]:
        """Its weight, and its bias where it has one."""
        start: Init = "zeros" if self.less_one else "ones"
        weight = Tensor(
            f"{self.name}.weight", (self.width,), "norm", start,
            sequence=not self.heads, heads=self.heads > 0, frozen=self.frozen,
        )  # fmt: skip
        yield weight
        if self.bias:
            yield replace(weight, name=f"{self.name}.bias", init="zeros")


@dataclass(frozen=True, slots=True)
class Matrix:
    """y = x Wᵀ + b with W: [rows, columns].

    pieces: the canonical matrices that lie in it below one another, (name, rows); each is cut over
    tp by itself.  A split output has a split bias; a row-parallel matrix adds the whole bias after
    its sum.  storage: of the weight, see Tensor; adapter: what is trained beside it.
    """

    name: str
    pieces: tuple[tuple[str, int], ...]
    columns: int
    cut: Cut
    bias: bool
    into_stream: bool = False
    storage: WeightFormat | None = None
    frozen: bool = False
    adapter: LowRank | None = None

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
        """Weight, and bias where it has one, of every piece; then its adapter's."""
        init: Init = "into stream" if self.into_stream else "normal"
        by_rows = self.cut == "rows"
        for name, rows in self.pieces:
            cuts: tuple[tuple[str, int], ...] = (("tp", 0 if by_rows else 1),)
            yield Tensor(
                f"{name}.weight", (rows, self.columns), "weight", init, cuts,
                storage=self.storage, frozen=self.frozen,
            )  # fmt: skip
            if self.bias:
                cuts = cuts if by_rows else ()
                yield Tensor(
                    f"{name}.bias", (rows,), "bias", "zeros", cuts,
                    sequence=not by_rows, frozen=self.frozen,
                )  # fmt: skip
        if self.adapter is not None:
            yield from self.adapter.tensors()


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
    frozen: bool = False
    adapter: LowRank | None = None

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows * self.columns

    def local_rows(self, tp: int) -> float:
        """Rows on one of so many tp ranks."""
        return self.rows / tp if self.vocabulary else self.rows

    def tensors(self) -> Iterator[Tensor]:
        """Its weight; then its adapter's."""
        cut = self.vocabulary
        yield Tensor(
            f"{self.name}.weight", (self.rows, self.columns), self.kind,
            cuts=(("tp", 0),) if cut else (), sequence=not cut, vocabulary=self.vocabulary,
            frozen=self.frozen,
        )  # fmt: skip
        if self.adapter is not None:
            yield from self.adapter.tensors()


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
