"""A second engine for tests: each replica stores its rows of every weight, whole only between the hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from megatron_lite.blueprint.ownership import Rows, cut_rows, rows_per_rank
from megatron_lite.engines.base import Update
from megatron_lite.engines.table import ENGINES
from megatron_lite.parallel.collectives import all_gather
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import MASTER, LocalParameter, NamedSlice, is_primary_copy

ZERO = ENGINES["zero"]


class Apart:
    """ZeRO's arithmetic over weights that lie apart; nothing but weights is its own.

    frees: outside the hooks a weight has no memory; else it has, full of nan.
    """

    frees = True

    def __init__(
        self, stages: Mapping[int, Sequence[LocalParameter]], ctx: ParallelContext, **settings: Any
    ) -> None:
        self.zero, self.ctx = ZERO(stages, ctx, **settings), ctx
        self.locals = [local for held in stages.values() for local in held]
        self.shards = {p.parameter: self._own(p.parameter).clone() for p in self.locals}
        self.open: list[Tensor] = []
        self.calls: list[tuple[str, int]] = []
        self._take_apart([local.parameter for local in self.locals])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.zero, name)

    def _rows(self, parameter: Tensor) -> Rows:
        return cut_rows(len(parameter), self.ctx.replicas.size)[self.ctx.replicas.rank]

    def _own(self, parameter: Tensor) -> Tensor:
        return parameter.detach()[slice(*self._rows(parameter))]

    def make_whole(self, parameters: Sequence[Tensor]) -> None:
        """Gather the rows of every rank."""
        assert not self.open, "the hooks of two layers overlap"
        self.open = list(parameters)
        for parameter in parameters:
            shard = self.shards[parameter]
            block = shard.new_zeros(
                rows_per_rank(len(parameter), self.ctx.replicas.size), *shard.shape[1:]
            )
            block[: len(shard)] = shard
            rows = all_gather(block, self.ctx.replicas)[: len(parameter)]
            parameter.data.untyped_storage().resize_(rows.nbytes)
            parameter.data.copy_(rows)  # .data: autograd need not know that the values were away

    def close(self) -> None:
        """Nobody reads what was whole any more."""
        self._take_apart(self.open)
        self.open = []

    def _take_apart(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            parameter.data.fill_(math.nan)
            if self.frees:
                parameter.data.untyped_storage().resize_(0)

    @contextmanager
    def _all_whole(self) -> Iterator[None]:
        self.make_whole([local.parameter for local in self.locals])
        yield
        self.close()

    def layer_hooks(self, parameters: Sequence[Tensor]) -> Around:
        """Whole around each layer."""
        return Around(self, list(parameters))

    def fill(self, write: Callable[[list[NamedSlice]], None], *, masters: bool = False) -> None:
        """The shards are written, and what ZeRO holds beside the weights as it does."""
        state = (part for part in self.zero.state(owned=False) if part.name.startswith(MASTER))
        write([*self.weights(owned=False), *(state if masters else ())])
        if not masters:
            with self._all_whole():
                self.zero.fill(lambda weights: None)

    def apply(self, norm: Tensor, **rates: Any) -> Update:
        """ZeRO's update, of which this rank keeps its rows."""
        with self._all_whole():
            update = self.zero.apply(norm, **rates)
            self.zero.wait_for_param_gather()
            for parameter, shard in self.shards.items():
                shard.copy_(self._own(parameter))
        return update

    def weights(self, *, owned: bool) -> Iterator[NamedSlice]:
        """The rows of each piece that lie here."""
        for local in self.locals:
            if owned and not is_primary_copy(local, self.ctx):
                continue
            here, shard = self._rows(local.parameter), self.shards[local.parameter]
            for piece in local.pieces:
                start, stop = max(piece.start, here.start), min(piece.stop, here.stop)
                if start < stop:
                    first, *others = piece.offset
                    yield NamedSlice(
                        piece.name, piece.shape, (first + start - piece.start, *others),
                        shard[start - here.start : stop - here.start],
                        replicated=self.ctx.replicas.size == 1,
                    )  # fmt: skip


class Around:
    """The hooks of one layer."""

    def __init__(self, engine: Apart, parameters: list[Tensor]) -> None:
        self.engine, self.parameters, self.number = engine, parameters, id(parameters)

    def _note(self, what: str) -> None:
        self.engine.calls.append((what, self.number))

    def before_forward(self) -> None:
        """Gather."""
        self._note("forward")
        self.engine.make_whole(self.parameters)

    def after_forward(self) -> None:
        """Take apart."""
        self.engine.close()
        self._note("forward ends")

    def before_backward(self, *, reads: bool) -> None:
        """Gather again."""
        self._note("backward")
        if reads:
            self.engine.make_whole(self.parameters)

    def after_backward(self) -> None:
        """Take apart again."""
        self.engine.close()
        self._note("backward ends")


class Poisoned(Apart):
    """A weight read outside its hooks spoils the loss instead of the process."""

    frees = False


def calls_of(engine: Apart) -> list[tuple[str, int]]:
    """(what, layer) of every call of its hooks, in order."""
    return engine.calls
