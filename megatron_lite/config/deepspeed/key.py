"""One key of a ds.json: what becomes of it, and how its value is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

FROM_FLAGS = "auto"
"""What Hugging Face's Trainer replaces by its own arguments; here the flags' values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedKey:
    """What happens to one key; `name` has dots between the levels."""

    name: str
    kind: Literal["mapped", "harmless", "refused"]
    say: str
    """What it means here, why it changes nothing, or the way out of the error."""
    to: tuple[str, ...] = ()
    """The section.fields that it sets; of a mapped key without any, a module of its own reads it."""
    read: Callable[[object], object] | None = None
    """The value as the field's, of several fields a tuple; ValueError in words behind the key's name."""
    off: tuple[object, ...] = ()
    """Of a refused or harmless key: values with which it asks for nothing."""
    switch: str | None = None
    """Of a whole section: the key inside that switches it on; without one it is on where it is not empty."""
    whole: bool = False
    """A section that is taken as one: its keys are not looked at one by one."""
    under: str | None = None
    """The key that must be true for this one to have a say."""
    flag_wins: bool = False
    """A flag that says something else wins instead of contradicting it."""

    def asks(self, value: object) -> bool:
        """Whether the value asks for anything at all."""
        if not self.whole:
            return not any(value == one and type(value) is type(one) for one in self.off)
        if isinstance(value, dict) and self.switch is not None:
            return value.get(self.switch) not in (None, False, "none", "")
        return bool(value)


def whole(value: object) -> int:
    """A number without a fraction, as DeepSpeed's too: 5e8 is one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        raise ValueError(f"takes a whole number, got {shown(value)}")
    return value


def positive(value: object) -> int:
    """A whole number of at least 1."""
    number = whole(value)
    if number < 1:
        raise ValueError(f"takes a whole number of at least 1, got {number}")
    return number


def real(value: object) -> float:
    """Any number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"takes a number, got {shown(value)}")
    return float(value)


def truth(value: object) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"takes true or false, got {shown(value)}")
    return value


def text_of(value: object) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"takes text in quotes, got {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value as the file has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f'"{value[:60]}"'
    if isinstance(value, dict):
        return "{...}"
    return f"{value:g}" if isinstance(value, float) else str(value)[:60]


def mapped_key(
    name: str, to: str, read: Callable[[object], object], **what: object
) -> DeepSpeedKey:
    """A row that sets one field or, with spaces between, several."""
    return DeepSpeedKey(
        name=name,
        kind="mapped",
        to=tuple(to.split()),
        read=read,
        **{"say": "", **what},  # type: ignore[arg-type]
    )


def apart(name: str, say: str, **what: object) -> DeepSpeedKey:
    """A row of a key that a module of its own reads together with others."""
    return DeepSpeedKey(name=name, kind="mapped", say=say, **what)  # type: ignore[arg-type]


def harmless(
    section: str, names: str, say: str, *off: object, **what: object
) -> Iterator[DeepSpeedKey]:
    """Rows that change nothing, for one reason."""
    for name in _within(section, names.split()):
        yield DeepSpeedKey(name=name, kind="harmless", say=say, off=off, **what)  # type: ignore[arg-type]


def refused_keys(
    section: str, names: str, say: str, *off: object, **what: object
) -> Iterator[DeepSpeedKey]:
    """Rows that are errors with one way out, but for the values at which they ask for nothing."""
    for name in _within(section, names.split()):
        yield DeepSpeedKey(name=name, kind="refused", say=say, off=off, **what)  # type: ignore[arg-type]


def _within(section: str, names: Sequence[str]) -> list[str]:
    return [f"{section}.{name}" if section else name for name in names]
