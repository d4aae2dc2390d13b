"""--help and --explain: what a flag means, where it lives and how its default compares."""

from __future__ import annotations

import textwrap

from megatron_lite.config.deepspeed.keys import KEYS
from megatron_lite.config.flags.legacy import LEGACY, MEGATRON_DEFAULTS, OURS_ONLY
from megatron_lite.config.flags.settings import FlagSetting, documentation, sections, settings

_INTRODUCTION = """\
Flags are Megatron's; --a_b and --a-b are the same, and --x=value is --x value.

the command line itself
  --config FILE            read a YAML file (also --yaml-cfg); a flag wins over the file
  --preset NAME            start from a named model; the file and flags win over it
  --list-presets           show the presets
  --explain FLAG           what a flag means, its default, and where it is defined
  --debug                  a traceback for every failure
  --extend FILE ...        run Python files first, which add rows of your own to the tables
  --deepspeed              read a ds.json of DeepSpeed, whose keys are flags here (docs/guides/deepspeed.md)
  --deepspeed-config FILE  which one; base64 of it, too
  --help                   this text
"""


def default_in_words(setting: FlagSetting) -> str:
    """A setting's default as --help and the docs write it."""
    if setting.required:
        return "required"
    if setting.kind is bool:
        return "on" if setting.default else "off"
    if isinstance(setting.default, list):
        return " ".join(map(str, setting.default)) or "none"
    return "none" if setting.default in (None, "") else str(setting.default)


def usage(setting: FlagSetting) -> str:
    """The flag as it is written: `--lr FLOAT`, `--bf16`, `--no-load-optim`."""
    if setting.kind is not bool:
        shown = setting.type_name if setting.choices else setting.type_name.upper()
        return f"{setting.flag} {shown}"
    return setting.off[0] if setting.default else setting.flag


def help_text() -> str:
    """All flags by section."""
    blocks = [_INTRODUCTION]
    for name, cls in sections().items():
        lines = [f"{name}: {(cls.__doc__ or '').splitlines()[0]}"]
        for setting in (s for s in settings().values() if s.section == name):
            lines.append(f"  {usage(setting)}")
            default = default_in_words(setting)
            if setting.kind is bool and setting.default:
                default = "on; this switches it off"
            text = f"{documentation(setting.key).text} [{default}]"
            lines += textwrap.wrap(text, 96, initial_indent=" " * 8, subsequent_indent=" " * 8)
        blocks.append("\n".join(lines) + "\n")
    for kind, title in (
        ("mapped", "other flags of Megatron, mapped"),
        ("no-op", "other flags of Megatron, accepted, changing nothing"),
    ):
        rows = [f"  {r.flag:<44} {r.say}" for r in LEGACY.values() if r.kind == kind]
        blocks.append("\n".join([title, *rows]) + "\n")
    return "\n".join(blocks)


def explain(flag: str, setting: FlagSetting | None) -> str:
    """The whole answer to --explain: `setting` is None for a row of the legacy table."""
    if setting is None:
        row = LEGACY[flag]
        what = {
            "mapped": "a flag of Megatron, mapped",
            "no-op": "a flag of Megatron, accepted, changes nothing",
            "refused": "a flag of Megatron, refused",
        }[row.kind]
        return f"{flag}  ({what})\n    {row.say}"
    doc = documentation(setting.key)
    lines = [
        f"{flag}  ({setting.key})",
        *textwrap.wrap(doc.text, 96, initial_indent="    ", subsequent_indent="    "),
        f"    type:     {setting.type_name}",
        f"    default:  {default_in_words(setting)}",
    ]
    if setting.key in MEGATRON_DEFAULTS:
        lines.append(f"    Megatron: {MEGATRON_DEFAULTS[setting.key]}")
    elif setting.key in OURS_ONLY:
        lines.append("    Megatron: has no such flag")
    spelt = [s for s in setting.spelt if s != flag]
    if spelt:
        lines.append(f"    also:     {', '.join(spelt)}")
    lines.append(f"    {doc.file}:{doc.line}")
    return "\n".join(lines)


def explain_command(flag: str) -> str:
    """The answer for a flag of the command line itself: its line of --help."""
    lines = [line.strip() for line in _INTRODUCTION.splitlines()]
    flag = "--config" if flag == "--yaml-cfg" else flag
    return next(line for line in lines if line.startswith(f"{flag} "))


def explain_key(name: str) -> str:
    """The answer for a key of a ds.json."""
    row = KEYS[name]
    flags = " ".join(settings()[field].flag for field in row.to)
    what = {"mapped": "mapped", "harmless": "accepted, changes nothing", "refused": "refused"}
    return f"{name}  (a key of a ds.json, {what[row.kind]})\n    {row.say or f'means {flags}'}"
