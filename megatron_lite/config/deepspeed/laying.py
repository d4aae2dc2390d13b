"""The values of a ds.json beside those of the flags: what is given where, and what contradicts what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from megatron_lite.config.deepspeed.key import FROM_FLAGS, shown


class FlagOfField(Protocol):
    """What is asked of the flag of a field."""

    @property
    def flag(self) -> str:
        """Its spelling."""

    @property
    def at_least(self) -> Mapping[str, int]:
        """Spellings that ask for so much or more."""

    @property
    def kind(self) -> type:
        """Its type."""

    @property
    def default(self) -> object:
        """Its default."""

    @property
    def allowed(self) -> tuple[object, ...]:
        """Its values; empty for any."""


@dataclass(frozen=True, slots=True)
class SaidKey:
    """A key of the file with its value; `place` is file and line."""

    name: str
    value: object
    place: str

    @property
    def is_auto(self) -> bool:
        """Whether the flags are to say it."""
        return self.value == FROM_FLAGS

    def __str__(self) -> str:
        return f"{self.place}: {self.name} {shown(self.value)}"


class Laying:
    """Values and their origins by section.field, as flags, files and presets left them; takes the file's."""

    def __init__(
        self,
        name: str,
        said: dict[str, SaidKey],
        *,
        flags: Mapping[str, FlagOfField],
        values: dict[str, object],
        origin: dict[str, str],
    ) -> None:
        self.name = name
        self.flags = flags
        self.said = said
        self.values = values
        self.origin = origin
        self.before = dict(origin)
        self.problems: list[str] = []
        self.notices: list[str] = []

    def given(self, field: str) -> bool:
        """Whether a flag or a YAML file says the field."""
        return self.before[field].startswith(("flag ", "file "))

    def flag(self, field: str) -> str:
        """The flag of a field with the value that was given, as it was written."""
        because = self.before[field]
        written = (
            because.removeprefix("flag ") if because.startswith("flag ") else self.flags[field].flag
        )
        where = f" ({because})" if because.startswith("file ") else ""
        value = self.values[field]
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        return f"{written}{'' if isinstance(value, bool) else f' {text}'}{where}"

    def give(self, field: str, value: object, key: SaidKey, *, flag_wins: bool = False) -> None:
        """Set a field; what a flag says must be the same, or wins where it may."""
        if not self.given(field):
            self.values[field] = value
            self.origin[field] = f"file {key.place} {key.name}"
        elif self.values[field] != value and flag_wins:
            self.notices.append(f"{key}: {self.flag(field)} wins")
        elif self.values[field] != value:
            self.problems.append(f"{key} contradicts {self.flag(field)}; keep one")

    def default(self, field: str, value: object, say: str) -> None:
        """DeepSpeed's default of a key that is not there, where no flag says the field."""
        if not self.given(field):
            self.values[field], self.origin[field] = value, f"file {self.name} default"
            self.notices.append(f"{self.name}: {say}")

    def from_flags(self, key: SaidKey, fields: Iterable[str]) -> None:
        """What is "auto" needs its flags; a switch that is not given is off."""
        for field in fields:
            setting = self.flags[field]
            if not self.given(field) and setting.kind is not bool:
                default = "" if setting.default is None else f" ({setting.default} is its default)"
                self.problems.append(
                    f"{key} takes the value of {setting.flag}, which is not given; give "
                    f"{setting.flag}{default} "
                    "or a value in the file"
                )
