"""Names of cases: short, and the same at each run; a name that is too long ends the run at the start.

A case is named in every list of failures and of durations; the beginning of what it tries is enough.
"""

from __future__ import annotations

from collections.abc import Iterable

VALUE, CASE = 40, 100
"""At most so many characters of one value, and of all that stands in the brackets."""


def shortened(value: object, argument: str) -> str | None:
    """A long text's beginning, the argument's name for long bytes, None for what is no such thing.

    Bytes that a compressor made differ at each run, so their beginning is no name.
    """
    if not isinstance(value, str | bytes):
        return None
    shown = ascii(value)
    if len(shown) <= VALUE:
        return None
    return argument if isinstance(value, bytes) else f"{shown[1:VALUE]}.."


def too_long(names: Iterable[str]) -> list[str]:
    """Names of tests whose case is named by more than CASE characters, cut to be readable."""
    return [f"{name[:CASE]}.. ({len(name)})" for name in names if len(case(name)) > CASE]


def case(name: str) -> str:
    """What stands in the brackets of a test's name; "" where there are none."""
    return name.partition("[")[2].removesuffix("]")
