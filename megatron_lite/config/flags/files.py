"""Configs as YAML: sections as top-level keys, fields below them, problems with file:line.

Only PyYAML's safe loader is used, which builds plain values and nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megatron_lite.config.errors import ConfigError, all_together
from megatron_lite.config.flags.settings import FlagSetting, sections, settings
from megatron_lite.config.flags.values import from_yaml
from megatron_lite.config.sections.run import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FileValues:
    """What a config file sets."""

    values: Mapping[str, object] = field(default_factory=dict)
    """section.field -> value."""
    preset: str | None = None
    """The preset the file starts from."""


def load(path: str) -> FileValues:
    """Read a YAML config file.

    Raises one ConfigError for an unreadable file or for all its unknown keys and wrong values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"--config {path}: cannot be read ({reason})") from None
    return loads(text, name=path)


def loads(text: str, *, name: str) -> FileValues:
    """`load` for text; `name` stands for the file in messages."""
    values: dict[str, object] = {}
    preset: str | None = None
    problems: list[str] = []
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        for key, node, line in _entries(root, name, "", problems):
            if key == "preset":
                preset = str(loader.construct_object(node))
            elif key in sections():
                for inner, value, at in _entries(node, name, f"{key}.", problems):
                    where = f"{name}:{at}: {key}.{inner}"
                    setting, now = _named(key, inner)
                    if setting is None:
                        problems.append(f"{where}: no such key{_near_field(key, inner)}")
                        continue
                    try:
                        built = loader.construct_object(value, deep=True)
                        values[setting.key] = from_yaml(
                            setting, now[built] if now and isinstance(built, bool) else built
                        )
                    except ValueError as error:
                        problems.append(f"{where} ({setting.flag}) {error}")
            else:
                problems.append(f"{name}:{line}: {key}: no such section{_near_section(key)}")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        spot = f"{name}:{mark.line + 1}" if mark else name
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{spot}: not valid YAML: {what}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested far too deep for a config file") from None
    if problems:
        raise all_together(problems, f"in {name}")
    return FileValues(values=values, preset=preset)


def _entries(
    node: yaml.Node | None, name: str, prefix: str, problems: list[str]
) -> Iterator[tuple[str, yaml.Node, int]]:
    """Key, value node and line of each entry of a mapping; what is not so becomes a problem."""
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"):
        return
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.MappingNode):
        what = f"{prefix[:-1]} must hold" if prefix else "a config file holds"
        problems.append(f"{name}:{line}: {what} `key: value` lines, got {node.id} instead")
        return
    seen: dict[str, int] = {}
    for key_node, value in node.value:
        at = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{name}:{at}: a key must be a name")
            continue
        key = key_node.value
        if key in seen:
            problems.append(f"{name}:{at}: {prefix}{key} stands at line {seen[key]} already")
            continue
        seen[key] = at
        yield key, value, at


def _named(section: str, name: str) -> tuple[FlagSetting | None, Mapping[bool, object]]:
    """The setting of a key; where the key is a switch it was once, what off and on are now."""
    found = settings().get(f"{section}.{name}")
    if found is not None:
        return found, {}
    for setting in settings().values():
        if setting.section == section and name in setting.was:
            return setting, setting.was[name]
    return None, {}


def _near_section(key: str) -> str:
    homes = [s.key for s in settings().values() if s.name == key.replace("-", "_")]
    if homes:
        return f"; write it below its section, as {homes[0]}"
    near = difflib.get_close_matches(key, [*sections(), "preset"], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"; {hint}there are {', '.join(sections())}"


def _near_field(section: str, key: str) -> str:
    name = key.replace("-", "_").lstrip("_")
    homes = [s.key for s in settings().values() if s.name == name]
    if homes:
        return f"; did you mean {homes[0]}?"
    near = difflib.get_close_matches(
        name, [s.name for s in settings().values() if s.section == section], n=1
    )
    return f"; did you mean {near[0]}?" if near else ""


def dump(config: RunConfig, origin: Mapping[str, str] | None = None) -> str:
    """The whole config as YAML text that `loads` reads back to an equal one.

    With `origin` (section.field -> where it came from) each line says so in a comment.
    """
    lines: list[str] = []
    for section in sections():
        lines.append(f"{section}:")
        for setting in (s for s in settings().values() if s.section == section):
            value = getattr(getattr(config, section), setting.name)
            source = (origin or {}).get(setting.key, "default")
            comment = "" if source == "default" else f"  # {_one_line(source)}"
            lines.append(f"  {setting.name}: {_yaml(value)}{comment}")
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _yaml(value: object) -> str:
    """One value on one line."""
    if isinstance(value, list):
        quoted = (_scalar(item, quote=isinstance(item, str)) for item in value)
        return f"[{', '.join(quoted)}]"
    # quotes escape what would otherwise need several lines or be folded away
    return _scalar(value, quote=isinstance(value, str) and not value.isprintable())


def _scalar(value: object, *, quote: bool) -> str:
    text: str = yaml.safe_dump(
        value, default_style='"' if quote else None, width=float("inf"), allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
