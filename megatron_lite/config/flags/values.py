"""From text or YAML to the type of a setting; ValueError says in words what was wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from megatron_lite.config.flags.settings import FlagSetting

LARGEST_INT = 2**63 - 1
"""Counters live in int64 arrays and files."""

_WHOLE = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")


def from_text(setting: FlagSetting, texts: Sequence[str]) -> object:
    """The values after a flag as the setting's type.

    Raises ValueError with words that continue the flag's name: "takes one value, got 2: ...".
    """
    if setting.many:
        if not texts:
            raise ValueError("takes one or more values, got none")
        return [_one(setting, text) for text in texts]
    if not texts and setting.switch:
        return "on"
    if not texts:
        raise ValueError(f"takes a value ({setting.type_name}), got none")
    if len(texts) > 1:
        shown = " ".join(map(repr, texts))
        raise ValueError(f"takes one value, got {len(texts)}: {shown}; quote what belongs together")
    return _one(setting, texts[0])


def from_yaml(setting: FlagSetting, value: object) -> object:
    """A value read from YAML as the setting's type; ValueError as in `from_text`."""
    if value is None:
        if setting.optional:
            return None
        raise ValueError(f"takes {setting.type_name}, got nothing")
    if setting.many:
        if not isinstance(value, list):
            raise ValueError(f"takes a list, got {value!r}")
        return [_one_yaml(setting, item) for item in value]
    return _one_yaml(setting, value)


def _one_yaml(setting: FlagSetting, value: object) -> object:
    if setting.kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"takes true or false, got {value!r}")
        return value
    if setting.switch and isinstance(value, bool):  # YAML 1.1 reads on and off so, too
        return "on" if value else "off"
    if setting.switch and not isinstance(value, str):  # no quotes would help
        choices = ", ".join(map(str, setting.choices))
        raise ValueError(f"takes one of {choices}, or true or false; got {value!r}")
    if setting.kind is str:
        if setting.many and isinstance(value, int | float) and not isinstance(value, bool):
            return _one(setting, repr(value))  # a blend's weight
        if not isinstance(value, str):
            raise ValueError(f"takes text, got {value!r}; put it in quotes")
        return _one(setting, value)
    # text too: YAML 1.1 reads 1e-5 as a string
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"takes {setting.type_name}, got {value!r}")
    return _one(setting, value if isinstance(value, str) else repr(value))


def _one(setting: FlagSetting, text: str) -> object:
    if setting.kind is int:
        return _chosen(setting, whole_number(text))
    if setting.kind is float:
        return _chosen(setting, finite_number(text))
    if text == "" and setting.default != "":
        raise ValueError("got an empty value (an unset shell variable?)")
    if "\0" in text:
        raise ValueError(f"got a NUL character in {text!r}")
    return _chosen(setting, text)


def _chosen(setting: FlagSetting, value: object) -> object:
    allowed = setting.allowed
    if not allowed or value in allowed:
        return value
    if setting.case_insensitive:
        for choice in allowed:
            if str(choice).lower() == str(value).lower():
                return choice
    own = "; a row of your own comes with --extend FILE" if setting.open else ""
    raise ValueError(f"takes one of {', '.join(map(str, allowed))}; got {value!r}{own}")


def whole_number(text: str) -> int:
    """An int64 written with digits, and _ between them; ValueError says what else it was."""
    stripped = text.strip()
    if not _WHOLE.fullmatch(stripped):
        try:
            number = float(stripped)
        except ValueError:
            raise ValueError(f"takes a whole number, got {_short(text)}") from None
        way_out = ""
        if math.isfinite(number) and number.is_integer() and abs(number) <= LARGEST_INT:
            way_out = f"; write {int(number)}"
        raise ValueError(f"takes a whole number, got the float {_short(text)}{way_out}")
    if len(stripped.replace("_", "")) > 20 or abs(int(stripped)) > LARGEST_INT:
        raise ValueError(f"takes a whole number up to 2^63-1, got {_short(text)}")
    return int(stripped)


def finite_number(text: str) -> float:
    """A float that is neither NaN nor infinite; ValueError says what else it was."""
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"takes a number, got {_short(text)}") from None
    if not math.isfinite(number):
        raise ValueError(f"takes a finite number, got {_short(text)}")
    return number


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}..."
