"""Write docs/FLAGS.md from the config sections and the table of Megatron's other flags.

python tools/flags.py            writes it (`make flags`)
python tools/flags.py --check    exits 2 where the file is not what it would write
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.flags.explain import default_in_words, usage
from megatron_lite.config.flags.legacy import LEGACY, MEGATRON_DEFAULTS, OURS_ONLY
from megatron_lite.config.flags.settings import FlagSetting, documentation, sections, settings
from megatron_lite.config.rules.table import NOT_YET, OFF_CHANGES_NOTHING
from megatron_lite.storage.disk import Disk, write_atomically

_ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = _ROOT / "docs" / "FLAGS.md"

INTRODUCTION = _ROOT / "tools" / "flags.md"
"""What stands above the tables, written by hand."""


def main() -> int:
    """Write the document, or compare it."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    asked = parser.parse_args()
    text = document()
    if not asked.check:
        write_atomically(DOCUMENT, text.encode("utf-8"), Disk())
        return 0
    if not DOCUMENT.exists() or DOCUMENT.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{DOCUMENT.relative_to(_ROOT)} is stale: run `make flags`")
    return 0


def document() -> str:
    """The whole text of docs/FLAGS.md."""
    introduction = INTRODUCTION.read_text(encoding="utf-8")
    return "\n".join([introduction, *_own_flags(), *_other_flags()]).rstrip("\n") + "\n"


def _own_flags() -> Iterator[str]:
    for name, cls in sections().items():
        yield f"### {name}\n"
        yield f"{(cls.__doc__ or '').splitlines()[0]}\n"
        yield "| flag | default | Megatron | meaning | read in |"
        yield "|---|---|---|---|---|"
        for setting in (s for s in settings().values() if s.section == name):
            cells = [
                _flag_cell(setting),
                _cell(default_in_words(setting)),
                _cell(_megatron_default(setting)),
                _cell(_meaning(setting)),
                _read_in(setting),
            ]
            yield f"| {' | '.join(cells)} |"
        yield ""


def _flag_cell(setting: FlagSetting) -> str:
    first = usage(setting)
    others = [s for s in (*setting.on, *setting.off) if s != first.split(" ", 1)[0]]
    if setting.kind is bool:  # its other half is one word: no need to name every spelling
        others = [s for s in others if s not in (f"--no-{setting.name.replace('_', '-')}",)]
    shown = f"`{first}`".replace("|", "\\|")
    return f"{shown} (also {', '.join(f'`{o}`' for o in others)})" if others else shown


def _megatron_default(setting: FlagSetting) -> str:
    if setting.key in OURS_ONLY:
        return "no such flag"
    return MEGATRON_DEFAULTS.get(setting.key, "")


def _meaning(setting: FlagSetting) -> str:
    text = documentation(setting.key).text
    rows = [row for row in NOT_YET if setting.flag in row.flag.split()]
    if rows:
        text += f" **Not built yet** ({'; '.join(row.flag for row in rows)}): {rows[0].instead}."
    if setting.key in OFF_CHANGES_NOTHING:
        text += f" Changes nothing: {OFF_CHANGES_NOTHING[setting.key]}."
    return text


def _read_in(setting: FlagSetting) -> str:
    files = sorted(readers()[setting.key], key=lambda name: name.startswith("cli/"))
    shown = ", ".join(f"`{name}`" for name in files[:3])
    return f"{shown}, ..." if len(files) > 3 else shown or "-"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _other_flags() -> Iterator[str]:
    titles = {
        "mapped": (
            "Other flags of Megatron, mapped",
            "They set flags of this project, and say so.",
        ),
        "no-op": ("Accepted, changing nothing", "They say so when the run starts."),
        "refused": ("Refused", "The error says what is written here."),
    }
    for kind, (title, sentence) in titles.items():
        yield f"## {title}\n\n{sentence}\n"
        yield "| flag | values | what happens |\n|---|---|---|"
        for row in (r for r in LEGACY.values() if r.kind == kind):
            values = " ".join((*row.values, *row.by_value)) or ("any" if row.takes_value else "")
            apart = "refused elsewhere" if kind == "no-op" else "elsewhere it changes nothing"
            say = f"{row.say}; {apart}: {row.otherwise}" if row.otherwise else row.say
            yield f"| `{row.flag}` | {values} | {_cell(say)} |"
        yield ""


@functools.cache
def readers() -> Mapping[str, tuple[str, ...]]:
    """section.field -> files that act on it: attribute reads outside its own definition.

    A property of a section (config.parallel.tp) stands for the fields it reads.  `x.split(...)` is a
    call of a method and no read.
    """
    found: dict[str, set[str]] = {key: set() for key in settings()}
    names = _names_of_fields()
    for path in sorted((_ROOT / "megatron_lite").rglob("*.py")):
        inside = path.relative_to(_ROOT / "megatron_lite").as_posix()
        if inside.startswith(_DEFINITIONS):
            continue
        for section, name in _attribute_reads(ast.parse(path.read_text(encoding="utf-8"))):
            if inside.startswith("cli/"):
                if f"{section}.{name}" in found:  # a bare name is mostly a flag of the tool's own
                    found[f"{section}.{name}"].add(inside)
                continue
            for key in names.get(name, ()):
                # a field's name says enough; a property's (`name`, `tp`) needs its section before it
                is_field = key.endswith(f".{name}")
                if section == key.split(".")[0] or (
                    section not in sections() and (is_field or section == "config")
                ):
                    found[key].add(inside)
    return {key: tuple(sorted(files)) for key, files in found.items()}


_DEFINITIONS = ("config/flags/", "config/rules/")
"""Where fields are named, checked and parsed, but nothing is done with them."""


def _names_of_fields() -> dict[str, set[str]]:
    """Attribute name -> the fields whose value it gives: the field itself, or a property over it."""
    names: dict[str, set[str]] = {}
    for key in settings():
        names.setdefault(key.split(".")[1], set()).add(key)
    for section, cls in sections().items():
        for name, member in vars(cls).items():
            if isinstance(member, property) and member.fget is not None:
                inner = set(member.fget.__code__.co_names)
                reads = {f"{section}.{field}" for field in inner} & set(settings())
                names.setdefault(name, set()).update(reads)
    return names


def _attribute_reads(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(last name of the owner, attribute) of every attribute that is read and not called."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in called:
            continue
        if isinstance(node.ctx, ast.Load) and not _is_self(node.value):
            owner = node.value
            last = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            yield last, node.attr


def _is_self(owner: ast.expr) -> bool:
    return isinstance(owner, ast.Name) and owner.id == "self"


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main))


if __name__ == "__main__":
    start()
