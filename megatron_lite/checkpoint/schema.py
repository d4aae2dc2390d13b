"""What may stand in a manifest, value by value: whole numbers, numbers, words, lists, mappings.

Each function returns the value as its type or raises a ValueError that names it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

LARGEST = 2**62
"""Counters and sizes live in int64, and sums of two of them, too."""


def checked_int(value: object, name: str, *, low: int = 0, high: int = LARGEST) -> int:
    """A whole number from low to high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {_short(value)}, not a whole number from {low} to {high}")
    return value


def number(value: object, name: str) -> float:
    """A finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} is {_short(value)}, not a finite number")
    return value


def word(value: object, name: str, among: Collection[str] | None = None) -> str:
    """A text, or one of several."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_short(value)}, not a text")
    if among is not None and value not in among:
        raise ValueError(f"{name} is {_short(value)}, not one of {', '.join(among)}")
    return value


def items(value: object, name: str, count: int | None = None) -> list[Any]:
    """A list, of so many items where count says so."""
    if not isinstance(value, list) or (count is not None and len(value) != count):
        size = "" if count is None else f" of {count} items"
        raise ValueError(f"{name} is {_short(value)}, not a list{size}")
    return value


def mapping(value: object, name: str) -> dict[str, Any]:
    """An object of JSON."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {_short(value)}, not an object of names and values")
    return value


def wholes(value: object, name: str, count: int | None = None) -> tuple[int, ...]:
    """A list of whole numbers from 0."""
    return tuple(checked_int(item, name) for item in items(value, name, count))


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an integer of thousands of digits
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
