"""A command line with Megatron's flags becomes a RunConfig.

Flags are made from the sections (`settings()`), the rest of Megatron's from the table in
legacy.py.  Precedence: default < preset < file < flag; `ParsedFlags.origin` remembers which won.
Nothing is ignored silently: what has no effect gives a notice, what is unknown an error.
"""

from __future__ import annotations

import copy
import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from megatron_lite.config.deepspeed.batches import BatchSizes
from megatron_lite.config.deepspeed.dialect import lay_config
from megatron_lite.config.deepspeed.keys import KEYS
from megatron_lite.config.errors import ConfigError, all_together
from megatron_lite.config.extensions import extend
from megatron_lite.config.flags.explain import (
    explain,
    explain_command,
    explain_key,
    help_text,
)
from megatron_lite.config.flags.files import load
from megatron_lite.config.flags.implied import imply
from megatron_lite.config.flags.legacy import LEGACY
from megatron_lite.config.flags.legacy_flag import Legacy
from megatron_lite.config.flags.presets import list_presets, preset
from megatron_lite.config.flags.settings import FlagSetting, sections, settings
from megatron_lite.config.flags.values import from_text, whole_number
from megatron_lite.config.flags.words import Use, dashed, no_values, uses
from megatron_lite.config.sections.run import RunConfig

_COMMANDS: Mapping[str, str] = {
    "--config": "config",
    "--yaml-cfg": "config",
    "--preset": "preset",
    "--debug": "debug",
    "--extend": "extend",
    "--deepspeed": "deepspeed",
    "--deepspeed-config": "deepspeed-config",
}
"""Flags of the command line itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedFlags:
    """A command line, understood."""

    config: RunConfig
    notices: tuple[str, ...]
    """One line for each flag that was mapped or changes nothing."""
    origin: Mapping[str, str]
    """section.field -> "default", "preset gpt2-124m", "file run.yaml" or "flag --lr"."""
    batches: BatchSizes | None = None
    """What a ds.json says of the batch, of which some is known only with the number of ranks."""

    def on(self, world_size: int) -> ParsedFlags:
        """The same on so many ranks; ConfigError where the batch of a ds.json does not come out even."""
        if self.batches is None:
            return self
        config, notices = self.batches.on(self.config, world_size)
        return replace(self, config=config, notices=(*self.notices, *notices), batches=None)

    def keys_of(self, message: str) -> Iterator[str]:
        """For each flag in a message that a ds.json has set, a line that says by which key."""
        for key, because in self.origin.items():
            match = re.fullmatch(r"file (.+:\d+) ([\w.]+)", because)
            flag = settings()[key].flag
            if match is not None and re.search(rf"{flag}(?![\w-])", message):
                yield f"{flag} is {match[2]} here: {match[1]}"


@dataclass(frozen=True, slots=True)
class Spelling:
    """One way to write a setting's flag; `value` is what a spelling without one sets, or asks for at least."""

    setting: FlagSetting
    value: object = None
    at_least: bool = False


@functools.cache
def spellings() -> Mapping[str, Spelling]:
    """Every spelling of every setting, with dashes."""
    found: dict[str, Spelling] = {}
    for setting in settings().values():
        is_bool = setting.kind is bool
        for flag in setting.on:
            assert flag not in found, f"{flag} is spelt twice"
            found[flag] = Spelling(setting, True if is_bool else None)
        for flag in setting.off:
            assert flag not in found, f"{flag} is spelt twice"
            found[flag] = Spelling(setting, "off" if setting.switch else False)
        for flag, value in (*setting.at_least.items(), *setting.means.items()):
            assert flag not in found, f"{flag} is spelt twice"
            found[flag] = Spelling(setting, value, flag in setting.at_least)
    return MappingProxyType(found)


def parse(argv: Sequence[str]) -> ParsedFlags:
    """Read the arguments after the program's name.

    Raises one ConfigError that lists everything wrong with the command line.  --help, --explain
    FLAG and --list-presets print and end the program with code 0.
    """
    _answer_questions(argv)
    reading = _Reading()
    found = [*uses(argv, reading.problems)]
    for use in found:
        if use.name == "--extend":
            extend(use.values)
    for use in found:
        reading.take(use)
    return reading.finish()


def _answer_questions(argv: Sequence[str]) -> None:
    """Print what --help, --explain or --list-presets ask for and leave."""
    for at, word in enumerate(argv):
        name, equals, inline = word.partition("=")
        if name in ("--help", "-h"):
            print(help_text())
        elif name == "--list-presets":
            print(list_presets())
        elif name == "--explain":
            asked = inline if equals else argv[at + 1] if at + 1 < len(argv) else ""
            if not asked:
                raise ConfigError("--explain takes a flag, e.g. --explain --lr; got none")
            flag = dashed(asked if asked.startswith("-") else f"--{asked}")
            if asked in KEYS or flag in _COMMANDS:
                print(explain_key(asked) if asked in KEYS else explain_command(flag))
                raise SystemExit(0)
            if flag not in spellings() and flag not in LEGACY:
                raise ConfigError(f"--explain {asked}: no such flag{_suggestion(flag)}")
            own = spellings().get(flag)
            print(explain(flag, own.setting if own else None))
        else:
            continue
        raise SystemExit(0)


def _suggestion(flag: str) -> str:
    known = {name.lower(): name for name in (*spellings(), *LEGACY, *_COMMANDS)}
    near = difflib.get_close_matches(flag.lower(), known, n=1, cutoff=0.6)
    return f"; did you mean {known[near[0]]}?" if near else "; --help lists all"


@dataclass(frozen=True, slots=True)
class _Given:
    value: object
    written: str
    own: bool = False

    def __str__(self) -> str:
        return f"{self.written} ({_show(self.value)})"


class _Reading:
    """What has been read so far: values given by flags, notices and problems."""

    def __init__(self) -> None:
        self.given: dict[str, _Given] = {}
        self.fallback: dict[str, _Given] = {}
        self.floors: dict[str, _Given] = {}
        self.tokens: dict[str, tuple[Legacy, int]] = {}
        self.conditional: list[tuple[Use, Legacy]] = []
        self.commands: dict[str, str] = {}
        self.deepspeed = ""
        self.notices: list[str] = []
        self.problems: list[str] = []

    def take(self, use: Use) -> None:
        """Understand one flag, or note the problem."""
        try:
            if use.name in _COMMANDS:
                self._command(use)
            elif use.name in spellings():
                self._own(use, spellings()[use.name])
            elif use.name in LEGACY:
                self._legacy(use, LEGACY[use.name])
            else:
                self.problems.append(f"{use.written}: unknown flag{_suggestion(use.name)}")
        except ValueError as error:
            self.problems.append(f"{use.written} {error}")

    def _command(self, use: Use) -> None:
        command = _COMMANDS[use.name]
        if command == "debug":
            no_values(use)
            return
        if command == "extend":
            if not use.values:
                raise ValueError("takes one or more Python files, got none")
            return  # they have been run
        if command == "deepspeed":
            self.deepspeed = use.written
            if not use.values:
                return
            command = "deepspeed-config"  # as Hugging Face's scripts have it
        if len(use.values) != 1 or not use.values[0]:
            raise ValueError(f"takes one value, got {list(use.values)}")
        earlier = self.commands.get(command)
        if earlier not in (None, use.values[0]):
            self.notices.append(
                _repeated(f"{use.written} {earlier}", f"{use.written} {use.values[0]}")
            )
        self.commands[command] = use.values[0]

    def _own(self, use: Use, spelling: Spelling) -> None:
        if spelling.value is None:
            value = from_text(spelling.setting, use.values)
            self._give(spelling.setting, value, use.written, own=True)
            return
        setting = spelling.setting
        if use.name in (*setting.at_least, *setting.means):
            no_values(use, f"; {setting.flag} takes one")
            if spelling.at_least:
                self.floors[setting.key] = _Given(spelling.value, use.written)
            else:
                self._give(setting, spelling.value, use.written)
            return
        off = spelling.value in (False, "off")
        other = setting.on if off else setting.off
        no_values(use, f"; {other[0]} is its opposite")
        self._give(setting, spelling.value, use.written, own=True)

    def _legacy(self, use: Use, legacy: Legacy) -> None:
        if legacy.kind == "refused":
            shown = " ".join((use.written, *use.values))
            self.problems.append(f"{shown}: not supported; {legacy.say}")
            return
        value = self._legacy_value(use, legacy)
        if legacy.needs:
            self.conditional.append((use, legacy))
            return
        if legacy.value_to is not None:
            setting = settings()[legacy.value_to]
            self._give(setting, from_text(setting, use.values), use.written)
        if legacy.tokens_to is not None:
            self.tokens[legacy.tokens_to] = (legacy, whole_number(value))
        for key, fixed in legacy.sets.items():
            self._give(settings()[key], fixed, use.written)
        for key, fixed in legacy.unless_given.items():
            self.fallback.setdefault(key, _Given(fixed, use.written))
        for key, fixed in legacy.by_value.get(value, {}).items():
            self._give(settings()[key], fixed, f"{use.written} {value}")
        self._say(use, legacy.say, changes=legacy.kind == "mapped")

    def _say(self, use: Use, what: str, *, changes: bool) -> None:
        """Note what a flag of the table did."""
        shown = " ".join((use.written, *use.values))
        notice = f"{shown}: {'' if changes else 'accepted, changes nothing: '}{what}"
        if notice not in self.notices:
            self.notices.append(notice)

    def _settle(self, values: dict[str, object], origin: dict[str, str]) -> None:
        """Flags of the table that hold only beside others, when all others are known."""
        for use, legacy in self.conditional:
            holds = all(values[key] in allowed for key, allowed in legacy.needs.items())
            if not holds and legacy.kind == "no-op":
                self.problems.append(f"{use.written}: {legacy.otherwise}")
                continue
            for key, fixed in legacy.unless_given.items():
                if holds and key not in self.given:
                    values[key], origin[key] = fixed, f"flag {use.written}"
            changes = holds and legacy.kind == "mapped"
            self._say(use, legacy.say if holds else legacy.otherwise, changes=changes)

    def _legacy_value(self, use: Use, legacy: Legacy) -> str:
        """The value of a flag of the table, checked; empty where it takes none."""
        if not legacy.takes_value:
            no_values(use)
            return ""
        if legacy.many:
            return ""
        if len(use.values) != 1:
            raise ValueError(f"takes one value, got {list(use.values)}")
        (value,) = use.values
        allowed = legacy.values or tuple(legacy.by_value)
        if allowed and value not in allowed:
            raise ValueError(f"takes only {' or '.join(allowed)} here, got {value!r}; {legacy.say}")
        return value

    def _give(
        self, setting: FlagSetting, value: object, written: str, *, own: bool = False
    ) -> None:
        """Set a field; of its own flags the last one counts, any other must say the same.

        own: written is a spelling of the field itself.
        """
        earlier, new = self.given.get(setting.key), _Given(value, written, own)
        if earlier is not None and earlier.value != value:
            apart = earlier.written != written and not (earlier.own and own)
            if apart and value == "auto":  # which contradicts nothing that another flag says
                return
            if apart and earlier.value != "auto":
                self.problems.append(f"{earlier} and {new} contradict each other; keep one")
                return
            self.notices.append(_repeated(str(earlier), str(new)))
        self.given[setting.key] = new

    def finish(self) -> ParsedFlags:
        """Put preset, file and flags together."""
        values: dict[str, object] = {k: copy.copy(s.default) for k, s in settings().items()}
        origin = dict.fromkeys(values, "default")
        try:
            self._lay_below(values, origin)
        except ConfigError as error:
            self.problems.append(str(error))
        for key, given in {**self.fallback, **self.given}.items():
            values[key], origin[key] = given.value, f"flag {given.written}"
        self._raise_to_floors(values, origin)
        for legacy, tokens in self.tokens.values():
            self._tokens_to_samples(legacy, tokens, values, origin)
        self._settle(values, origin)
        batches = self._lay_deepspeed(values, origin)
        if self.problems:
            raise all_together(self.problems, "on the command line")
        self.notices += imply(values, origin)
        return ParsedFlags(
            config=_build(values),
            notices=tuple(self.notices),
            origin=MappingProxyType(origin),
            batches=batches,
        )

    def _raise_to_floors(self, values: dict[str, object], origin: dict[str, str]) -> None:
        """What a flag asks for at least; another flag of the same field may not say less."""
        for key, floor in self.floors.items():
            given, least, now = self.given.get(key), floor.value, values[key]
            assert isinstance(least, int) and isinstance(now, int)
            if now >= least:
                continue
            if given is not None:
                self.problems.append(
                    f"{given} and {floor.written} (at least {least}) contradict each other; keep one"
                )
                continue
            values[key], origin[key] = least, f"flag {floor.written}"

    def _lay_deepspeed(
        self, values: dict[str, object], origin: dict[str, str]
    ) -> BatchSizes | None:
        """A ds.json, once all flags are known."""
        where = self.commands.get("deepspeed-config")
        if where is None or not self.deepspeed:
            if where is not None:
                self.problems.append(
                    f"--deepspeed_config {where} has no say without --deepspeed; add it, or drop both"
                )
            elif self.deepspeed:
                self.problems.append(
                    "--deepspeed needs --deepspeed_config FILE; add it, or drop --deepspeed"
                )
            return None
        try:
            laid = lay_config(where, settings(), values=values, origin=origin)
        except ConfigError as error:
            self.problems.append(str(error))
            return None
        self.problems += laid.problems
        self.notices += laid.notices
        return laid.batches

    def _lay_below(self, values: dict[str, object], origin: dict[str, str]) -> None:
        path = self.commands.get("config")
        file = load(path) if path else None
        name = self.commands.get("preset") or (file.preset if file else None)
        if name:
            for key, value in preset(name).items():
                values[key], origin[key] = value, f"preset {name}"
        for key, in_file in file.values.items() if file else ():
            values[key], origin[key] = in_file, f"file {path}"

    def _tokens_to_samples(
        self, legacy: Legacy, tokens: int, values: dict[str, object], origin: dict[str, str]
    ) -> None:
        length = values["model.seq_length"]
        key = legacy.tokens_to
        assert isinstance(length, int) and key is not None
        if length < 1:
            self.problems.append(f"{legacy.flag} {tokens} needs --seq-length to count samples")
            return
        if tokens < 1:
            self.problems.append(f"{legacy.flag} {tokens}: must be at least 1")
            return
        samples = -(-tokens // length)
        other = self.given.get(key)
        if other is not None and key == "train.train_samples":
            assert isinstance(other.value, int)
            samples = min(samples, other.value)
        elif other is not None and other.value != samples:
            self.problems.append(
                f"{legacy.flag} {tokens} is {samples} samples of {length} tokens, but "
                f"{other.written} says {other.value}; keep one"
            )
        values[key], origin[key] = samples, f"flag {legacy.flag}"


def _repeated(first: str, last: str) -> str:
    return f"{first} and {last}: the last one counts"


def _show(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _build(values: Mapping[str, object]) -> RunConfig:
    built: dict[str, Any] = {}
    for section, cls in sections().items():
        prefix = f"{section}."
        built[section] = cls(
            **{k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        )
    return RunConfig(**built)
