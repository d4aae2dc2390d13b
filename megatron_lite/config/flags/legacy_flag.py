"""One flag of the Megatron family that is no config field here: what happens to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Legacy:
    """What happens to one flag of the Megatron family."""

    flag: str
    kind: Literal["mapped", "no-op", "refused"]
    say: str
    """The notice, or the way out of the error."""
    takes_value: bool = False
    values: tuple[str, ...] = ()
    """The values that are accepted; empty for any."""
    sets: Mapping[str, object] = field(default_factory=dict)
    """section.field -> value, as if its own flag had been given."""
    unless_given: Mapping[str, object] = field(default_factory=dict)
    """The same, but a flag of the field itself wins."""
    by_value: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Value -> section.field -> value, as if its own flag had been given; the values are all there are."""
    value_to: str | None = None
    """section.field that receives the value."""
    many: bool = False
    """Takes any number of values, none too."""
    needs: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """section.field -> the values under which it holds: elsewhere a mapped flag changes nothing, and
    one that changes nothing is refused."""
    otherwise: str = ""
    """What is said then."""
    tokens_to: str | None = None
    """section.field that receives the value, in tokens, as samples (rounded up)."""


def mapped(flag: str, say: str, **what: object) -> Legacy:
    """A row that sets fields."""
    return Legacy(flag=flag, kind="mapped", say=say, **what)  # type: ignore[arg-type]


def no_op(flag: str, say: str, *values: str, **what: object) -> Legacy:
    """A row that is accepted; values: the only ones it takes."""
    what = {"takes_value": bool(values), **what}
    return Legacy(flag=flag, kind="no-op", say=say, values=values, **what)  # type: ignore[arg-type]


def refused(flag: str, way_out: str) -> Legacy:
    """A row that is an error with its way out."""
    return Legacy(flag=flag, kind="refused", say=way_out)
