"""Parameters, their gradients and states a portion at a time: what is made beside them stays small.

Each portion has about as many elements as stay in a core's cache, or fill a device; what a rule's
formula makes in between is of that size, whatever the model's.  States in fewer bits than the
parameters are computed with in the parameters' format, and rounded (rounding.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from megatron_lite.optim.rounding import round_into

_AT_ONCE_ON_CPU, _AT_ONCE = 1 << 18, 1 << 23
"""Elements of a portion; of one fp32 number 1 and 32 MiB."""


class Slab(NamedTuple):
    """The same rows of a parameter, its gradient and its states."""

    parameter: Tensor
    gradient: Tensor
    states: tuple[Tensor, ...]

    @property
    def is_narrow(self) -> bool:
        """Whether a state is kept in another format than the parameter."""
        return any(state.dtype != self.parameter.dtype for state in self.states)


class Columns(NamedTuple):
    """A portion's tensors by kind, for functions that take lists; states: one list for each name."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    states: tuple[list[Tensor], ...]


def slabs(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    names: Sequence[str],
) -> list[Slab]:
    """What a rule was given, tensor by tensor, with the states of these names."""
    return [
        Slab(parameter, gradient, tuple(state[name] for name in names))
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True)
    ]


def columns(held: Sequence[Slab]) -> Columns:
    """The other way round; there must be some."""
    parameters, gradients, states = zip(*held, strict=True)
    by_name = tuple(list(column) for column in zip(*states, strict=True))
    return Columns(list(parameters), list(gradients), by_name)


def portions(held: Sequence[Slab]) -> Iterator[list[Slab]]:
    """The same, cut and put together again."""
    portion: list[Slab] = []
    size = 0
    for rows in held:
        limit = _AT_ONCE_ON_CPU if rows.parameter.device.type == "cpu" else _AT_ONCE
        for piece in _cut(rows, limit):
            if portion and size + piece.parameter.numel() > limit:
                yield portion
                portion, size = [], 0
            portion.append(piece)
            size += piece.parameter.numel()
    if portion:
        yield portion


@contextmanager
def widened(portion: Sequence[Slab], *, update: int) -> Iterator[Columns]:
    """Its states in the parameters' format; afterwards those that are kept in fewer bits are rounded.

    update: updates before this one.  What was not changed has the same bits again.
    """
    kept = columns(portion)
    wide = Columns(
        kept.parameters,
        kept.gradients,
        tuple(
            [state.to(p.dtype) for state, p in zip(states, kept.parameters, strict=True)]
            for states in kept.states
        ),
    )
    yield wide
    for stored, exact in zip(kept.states, wide.states, strict=True):
        round_into(stored, exact, update=update)


def _cut(rows: Slab, limit: int) -> Iterator[Slab]:
    """Views of so many rows that their elements are within the limit, of one row at least."""
    size = rows.parameter.numel()
    if size <= limit:
        yield rows
        return
    length = rows.parameter.shape[0]
    at_once = max(1, limit * length // size)
    for first in range(0, length, at_once):
        here = slice(first, first + at_once)
        yield Slab(rows.parameter[here], rows.gradient[here], tuple(s[here] for s in rows.states))
