"""The config sections read as data: every field's name, flags, type, default and explanation.

Flags, YAML files, --help, --explain and the rules all start from `settings()`, so that a field
is named, typed, defaulted and explained in one place only: its section.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_lite.config.registry import added
from megatron_lite.config.sections.run import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagSetting:
    """One field of one section."""

    section: str
    name: str
    kind: type
    """int, float, str or bool; of one item where `many`."""
    choices: tuple[object, ...]
    """The values of a Literal, or the rows of the setting's table; empty for anything."""
    optional: bool
    many: bool
    default: object
    case_insensitive: bool
    required: bool
    one_start: bool
    """Asked of one start, not of the run: config.yaml does not keep it."""
    on: tuple[str, ...]
    """Spellings that set it; the first is the flag."""
    off: tuple[str, ...]
    """Spellings that switch it off; the first is the flag."""
    open: bool = False
    """Its values are rows of a table, to which a program may have added some."""
    at_least: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Spellings without a value that ask for so much or more."""
    means: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """Spellings without a value that ask for this one."""
    was: Mapping[str, Mapping[bool, object]] = dataclasses.field(default_factory=dict)
    """Switches that older files have in its place -> what off and on are now."""
    switch: bool = False
    """Its words hold on and off: the bare flag is on, and a file may say true or false."""

    @property
    def spelt(self) -> tuple[str, ...]:
        """Every spelling, the flag first."""
        return (*self.on, *self.off, *self.at_least, *self.means)

    @property
    def allowed(self) -> tuple[object, ...]:
        """The choices, and the rows that were added to their table; empty for anything."""
        return (*self.choices, *added(self.key, self.choices)) if self.open else self.choices

    @property
    def key(self) -> str:
        """section.field, as in files and in `ParsedFlags.origin`."""
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        """The flag to name in a message."""
        return self.on[0]

    @property
    def type_name(self) -> str:
        """The type in words, for --help and docs."""
        name = "|".join(map(str, self.allowed)) if self.choices else self.kind.__name__
        return f"{name} ..." if self.many else name


@dataclass(frozen=True, slots=True)
class Documentation:
    """What stands below a field in its section, and where."""

    text: str
    file: str
    line: int


def sections() -> dict[str, type]:
    """Section name -> its dataclass, in RunConfig's order."""
    hints = typing.get_type_hints(RunConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(RunConfig)}


@functools.cache
def settings() -> Mapping[str, FlagSetting]:
    """section.field -> FlagSetting, in the sections' order."""
    found = [
        _setting(section, field, hint)
        for section, cls in sections().items()
        for field, hint in _fields(cls)
    ]
    return types.MappingProxyType({setting.key: setting for setting in found})


def _fields(cls: type) -> list[tuple[dataclasses.Field[object], object]]:
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _setting(section: str, field: dataclasses.Field[object], hint: object) -> FlagSetting:
    optional = many = False
    choices: tuple[object, ...] = ()
    # Literal[...] | None is a typing.Union up to Python 3.13
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        optional = True
        (hint,) = (arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    if typing.get_origin(hint) is list:
        many = True
        (hint,) = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        hint = type(choices[0])
    assert hint in (int, float, str, bool), f"{section}.{field.name}: no flag for type {hint}"
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        default = field.default
    meta = field.metadata
    choices = meta.get("rows", choices)
    dashed = field.name.replace("_", "-")
    on = (meta.get("flag", f"--{dashed}"), *meta.get("aliases", ()))
    off: tuple[str, ...] = ()
    if hint is bool or "switch" in meta:
        off = (f"--no-{dashed}", *meta.get("aliases_off", ()))
        off = (meta["off"], *off) if "off" in meta else off
    return FlagSetting(
        section=section,
        name=field.name,
        kind=typing.cast(type, hint),
        choices=choices,
        optional=optional,
        many=many,
        default=default,
        case_insensitive=bool(meta.get("case_insensitive", False)),
        required=bool(meta.get("required", False)),
        one_start=bool(meta.get("one_start", False)),
        open="rows" in meta,
        switch="switch" in meta,
        at_least=meta.get("at_least", {}),
        means=meta.get("means", {}),
        was=meta.get("was", {}),
        on=on,
        off=off,
    )


@functools.cache
def documentation(key: str) -> Documentation:
    """The docstring below the field `section.field`, with its file and line.

    Read from the source on demand: only --help, --explain and the docs need it.
    """
    section, name = key.split(".")
    cls = sections()[section]
    lines, first = inspect.getsourcelines(cls)
    tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    assert isinstance(tree, ast.ClassDef)
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and field.target.id == name
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            text = " ".join(inspect.cleandoc(str(below.value.value)).split())
            return Documentation(text, inspect.getfile(cls), first + field.lineno - 1)
    raise AssertionError(f"{key} has no docstring below it")
