"""Chinese prose out of what the packages hold: plain-text handbooks and manual pages in roff."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_SHARE = 0.3  # of a paragraph's characters that are Han; less is a table, a command or English
_SHORTEST = 12  # characters of a paragraph
_HEADING = re.compile(r"^(?:第 *)?\d+(?:\.\d+)*\.? ?(?:章\.?)? +(?=\S)")
_WIDE = re.compile(r"[\u2e80-\uffef]")


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and the paragraphs below it."""

    heading: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        """Both, a line each."""
        return "\n".join((self.heading, *self.paragraphs))

    @property
    def asks(self) -> bool:
        """The heading is a question, in Chinese."""
        return self.heading.endswith(("?", "？")) and is_chinese(self.heading)


def is_chinese(text: str) -> bool:
    """Enough of it is Han."""
    return len(_HAN.findall(text)) >= _SHARE * len(text)


def join_lines(lines: Sequence[str]) -> str:
    """Lines of a wrapped paragraph as one: a space only where two words of Latin letters meet."""
    text = ""
    for line in filter(None, map(str.strip, lines)):
        gap = " " if text and not (_WIDE.match(text[-1]) or _WIDE.match(line[0])) else ""
        text += gap + line
    return text


def kept(paragraphs: Iterator[str]) -> tuple[str, ...]:
    """Those that are Chinese prose."""
    return tuple(p for p in paragraphs if len(p) >= _SHORTEST and is_chinese(p))


def handbook_sections(text: str) -> Iterator[Section]:
    """Sections of a plain-text handbook: numbered headings at the margin, paragraphs indented."""
    heading, body = "", list[str]()
    for block in re.split(r"\n\s*\n", text.replace("\f", "\n")):
        lines = block.split("\n")
        first = next((line for line in lines if line.strip()), "")
        if first[:1].strip() and _HEADING.match(first):
            yield from _section(heading, body)
            heading, body = _HEADING.sub("", join_lines(lines)), []
        else:
            body.append(join_lines(lines))
    yield from _section(heading, body)


def _section(heading: str, body: Sequence[str]) -> Iterator[Section]:
    paragraphs = kept(iter(body))
    if heading and paragraphs:
        yield Section(heading, paragraphs)


_BREAKS = {"PP", "P", "LP", "TP", "IP", "HP", "TQ", "br", "sp", "Pp", "It", "RS", "RE", "Bl", "El"}
_HEADS = {"SH", "SS", "Sh", "Ss"}
_INLINE = {
    "B",
    "I",
    "R",
    "BR",
    "IR",
    "RB",
    "RI",
    "BI",
    "IB",
    "SM",
    "SB",
    "Nm",
    "Xr",
    "Ar",
    "Em",
    "Li",
    "Dq",
}
_CODE = {"nf": "fi", "EX": "EE", "Vb": "Ve", "de": ".", "Bd": "Ed", "ig": ".", "TS": "TE"}
_ESCAPES = (
    (re.compile(r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[-+]?\d|\\\*(?:\[[^\]]*\]|\(..|.)|\\\".*"), ""),
    (re.compile(r"\\\((?:co|bu|em|en|hy|mi)|\\-"), "-"),
    (re.compile(r"\\\(..|\\\[[^\]]*\]|\\[&,/|^:%)c]"), ""),
    (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\[e\\]"), "\\\\"),
)  # fmt: skip


def without_escapes(text: str) -> str:
    """A line of roff as its reader sees it, without fonts."""
    for pattern, instead in _ESCAPES:
        text = pattern.sub(instead, text)
    return text


def page_sections(source: str) -> Iterator[Section]:
    """Sections of a manual page; code, tables and definitions are left out."""
    heading, body, lines = "", list[str](), list[str]()
    until: str | None = None
    for line in source.split("\n"):
        macro, _, rest = (
            line[1:].lstrip().partition(" ") if line[:1] in (".", "'") else ("", "", line)
        )
        if until is not None:
            until = None if macro == until else until
        elif line[:1] not in (".", "'"):
            if line.strip():
                lines.append(without_escapes(line))
            else:
                body, lines = [*body, join_lines(lines)], []
        elif macro in _INLINE:
            lines.append(without_escapes(rest).replace('"', ""))
        elif macro in _CODE or macro in _BREAKS or macro in _HEADS:
            body, lines, until = [*body, join_lines(lines)], [], _CODE.get(macro)
            if macro in _HEADS:
                yield from _section(heading, body)
                heading, body = without_escapes(rest).replace('"', "").strip(), []
    yield from _section(heading, [*body, join_lines(lines)])
