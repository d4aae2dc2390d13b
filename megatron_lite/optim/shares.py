"""What a rule is told where tp ranks hold parts of the tensors it updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class TpShare(NamedTuple):
    """What a member of an update is of its canonical tensor.

    shape: of the whole tensor, without the padding of a vocabulary.  cut: the dim of which each tp
    rank has some, perhaps none; None where it has all.
    """

    shape: tuple[int, ...]
    cut: int | None = None


def alone(tensors: Sequence[Tensor]) -> None:
    """The sum over one rank: what is there."""


@dataclass(frozen=True, slots=True)
class TpShares:
    """Of each member, what part it is; and how numbers are summed over the ranks that have the others.

    total: in place, all tensors of a call at once.  Collective over tp: each rank has the same
    members in the same order, and passes tensors of the same shapes.
    """

    of: Sequence[TpShare]
    total: Callable[[Sequence[Tensor]], None] = alone
