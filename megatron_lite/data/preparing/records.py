"""Records become texts, by keys or a template; what is not a record is an error or is counted.

{"title": "A", "text": "B"}  --json-keys text              ─▶ "B"
                             --template '{title}\\n\\n{text}'  ─▶ "A\\n\\nB"
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.data.preparing.parts import LONGEST_LINE, NoRecord, RecordBatch, too_long
from megatron_lite.data.preparing.texts import text_record

OnBadLine = Literal["error", "skip"]
_SHOWN = 80  # characters of a bad line

FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class BadRecord(Exception):
    """One record cannot be used: a short reason to count by, and the whole story."""

    def __init__(self, reason: str, story: str) -> None:
        super().__init__(story)
        self.reason = reason


@dataclass(slots=True)
class Texts:
    """The texts of a batch for one key, one after the other, and how many each record has."""

    texts: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


@dataclass(slots=True)
class ParsedBatch:
    """A batch as texts: per key; which line each record is; what was skipped, by reason."""

    keys: list[Texts]
    lines: list[int]
    skipped: Counter[str]


class Doubtful(dict[str, Any]):
    """A line's record whose texts may hold half of a UTF-16 pair; what orjson reads holds none."""


def fast_loads() -> Callable[[bytes], Any]:
    """orjson's loads where it is installed, else json's; what orjson refuses json decides."""
    try:
        import orjson  # noqa: PLC0415  an optional extra
    except ImportError:
        return slow_loads
    loads: Callable[[bytes], Any] = orjson.loads
    return loads


def slow_loads(line: bytes) -> Any:
    """json's loads; it takes half of a UTF-16 pair, NaN, and integers of any length."""
    record = json.loads(line)
    return Doubtful(record) if isinstance(record, dict) else record


class Reader:
    """Turns batches into texts."""

    def __init__(
        self,
        keys: Sequence[str] = ("text",),
        template: str | None = None,
        on_bad_line: OnBadLine = "error",
        longest: int = LONGEST_LINE,
    ) -> None:
        self._longest = longest
        self._keys = keys
        self._template = Template(template) if template is not None else None
        self._skip = on_bad_line == "skip"
        self._loads = fast_loads()

    @property
    def columns(self) -> list[str]:
        """The top-level keys of a record that are looked at."""
        return self._template.columns if self._template else list(self._keys)

    def parse(self, batch: RecordBatch) -> ParsedBatch:
        """DataError names file and line of the first bad record, unless they are skipped."""
        parsed = ParsedBatch([Texts() for _ in self._keys], [], Counter())
        take = functools.partial(self._extract, parsed.keys)
        parsed.lines = self.walk(batch, take, parsed.skipped)
        return parsed

    def walk(
        self, batch: RecordBatch, take: Callable[[Any, bool], None], skipped: Counter[str]
    ) -> list[int]:
        """Hand over every record, and whether all its texts can be encoded; returns the lines taken.

        take raises BadRecord for one that it cannot use: an error, or counted where they are skipped.
        """
        if batch.records is None:
            # line by line: to split all at once would copy the batch to fresh memory
            records: Iterator[tuple[int, Any]] = enumerate(io.BytesIO(batch.data))
            load: Callable[[Any], Any] = self._load_text if batch.plain else self._load
        else:
            records, load = enumerate(batch.records), usable
        lines, taken = batch.records is None, []
        for number, raw in records:
            try:
                record = load(raw)
                if record is not None:
                    take(record, lines and type(record) is dict)
                    taken.append(number)
            except BadRecord as error:
                if not self._skip:
                    raw = raw.removesuffix(b"\n") if isinstance(raw, bytes) else raw
                    raise bad_line(batch, number, raw, str(error)) from error
                skipped[error.reason] += 1
        return taken

    def _load(self, line: bytes) -> Any:
        """The JSON of a line, None for an empty one."""
        if len(line) - line.endswith(b"\n") > self._longest:
            usable(too_long(self._longest))
        try:
            return self._loads(line)
        except ValueError:
            pass
        line = line.removesuffix(b"\n")
        if not line.strip():
            return None
        # orjson refuses what json takes (NaN, a lone surrogate in a key not asked for)
        try:
            return slow_loads(line)
        except UnicodeDecodeError as error:
            raise BadRecord("no UTF-8", f"no UTF-8 ({error.reason})") from error
        except (ValueError, RecursionError) as error:
            raise BadRecord("no JSON", f"no JSON ({error})") from error

    def _load_text(self, line: bytes) -> Any:
        """A line that is a text itself, None for an empty one."""
        if not line.strip():
            return None
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        return usable(text_record(text, self._longest))

    def _extract(self, into: Sequence[Texts], record: Any, sure: bool) -> None:
        """sure: every text of the record can be encoded."""
        require_object(record)
        if self._template is not None:
            text = check_text(self._template.fill(record), "the template's text")
            into[0].texts.append(text)
            into[0].counts.append(1)
            return
        found = [texts_of(record, key, sure) for key in self._keys]
        for key, texts in zip(into, found, strict=True):
            key.texts += texts
            key.counts.append(len(texts))


def require_object(record: Any) -> None:
    """BadRecord for a line that is JSON, but no object."""
    if not isinstance(record, dict):
        raise BadRecord("no object", f"a JSON {type(record).__name__}, not an object")


def usable(record: Any) -> Any:
    """The record itself, unless it only stands for one."""
    if isinstance(record, NoRecord):
        raise BadRecord(record.reason, record.story)
    return record


def texts_of(record: dict[str, Any], key: str, sure: bool) -> list[str]:
    """The text of a key: a string, or a list of strings that become sequences of their own."""
    text = record.get(key)
    if type(text) is str:
        return [text] if sure else [check_text(text, f"key {key!r}")]
    if key not in record:
        raise BadRecord("key missing", f"no key {key!r}, it has {sorted(record)}")
    if not isinstance(text, list) or not all(isinstance(part, str) for part in text):
        story = f"key {key!r} is {type(text).__name__}, not text or a list of texts"
        raise BadRecord("no text", story)
    return text if sure else [check_text(part, f"key {key!r}") for part in text]


def check_text(text: str, what: str) -> str:
    """The text itself, unless it holds half of a UTF-16 pair, which no encoding can write."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord("lone surrogate", f"{what} holds a lone surrogate") from error
    return text


def bad_line(batch: RecordBatch, index: int, raw: Any, what: str) -> DataError:
    """The error for one line of the input: where, what, and how it begins."""
    if isinstance(raw, bytes):
        start = raw[: 4 * _SHOWN].decode("utf-8", errors="replace")[:_SHOWN]
    else:
        start = "" if isinstance(raw, NoRecord) else repr(raw)[:_SHOWN]
    return DataError(
        f"{batch.where(index)}: {what} - mend or remove the line, or give --on-bad-line skip: "
        f"{start}"
    )


@dataclass(frozen=True, slots=True)
class Field:
    """`{a.b[].c?}`: the names on the way, with their brackets; may be missing or empty."""

    path: tuple[str, ...]
    optional: bool


class Template:
    """Text with fields: `{title}`, `{meta.url}`, `{paragraphs[].text}`, `{input?}`.

    `[]` goes through a list and puts a newline between its texts.  A field ending in `?` may be
    missing, null or empty, and a line of the template that holds only such fields, all empty, is
    left out.  `\\n` and `\\t` are newline and tab, `{{` and `}}` braces.
    flag: what gives it; constant: whether it may be the same for every record.
    """

    def __init__(self, template: str, flag: str = "--template", *, constant: bool = False) -> None:
        self._text, self._flag = template, flag
        unescaped = template.replace("\\n", "\n").replace("\\t", "\t")
        self._lines = [self._parts(line) for line in unescaped.split("\n")]
        fields = [part for line in self._lines for part in line if isinstance(part, Field)]
        if not fields and not constant:
            raise ConfigError(f"{flag} {template!r} has no field such as {{text}}")
        self.columns = list(dict.fromkeys(part.path[0].removesuffix("[]") for part in fields))

    def _parts(self, line: str) -> list[str | Field]:
        parts: list[str | Field] = []
        at = 0
        for found in FIELD.finditer(line):
            parts.append(line[at : found.start()])
            at = found.end()
            if found[0] in ("{{", "}}"):
                parts.append(found[0][0])
                continue
            name = (found[1] or "").strip()
            path = tuple(name.removesuffix("?").split("."))
            if not all(part.removesuffix("[]") for part in path):
                raise ConfigError(
                    f"{self._flag} {self._text!r}: {found[0]!r} is no field; write {{key}}, "
                    "{key.inner}, {list[].key} or {key?}, and {{ or }} for a brace"
                )
            parts.append(Field(path, name.endswith("?")))
        return [part for part in [*parts, line[at:]] if part != ""]

    def fill(self, record: dict[str, Any]) -> str:
        """The text of a record; BadRecord where a field is missing or no text."""
        lines = []
        for parts in self._lines:
            filled = [part if isinstance(part, str) else value_of(record, part) for part in parts]
            line = "".join(filled)
            optional = all(isinstance(part, Field) and part.optional for part in parts)
            if line or not parts or not optional:
                lines.append(line)
        return "\n".join(lines)


def value_of(record: dict[str, Any], wanted: Field) -> str:
    """The text a field names."""
    found: list[Any] = [record]
    for step in wanted.path:
        name = step.removesuffix("[]")
        inner: list[Any] = []
        for value in found:
            if not isinstance(value, dict) or value.get(name) is None:
                if wanted.optional:
                    continue
                has = f"it has {sorted(value)}" if isinstance(value, dict) else "it is no object"
                raise BadRecord("key missing", f"no key {name!r} for the template, {has}")
            inner.append(value[name])
        if step.endswith("[]"):
            for value in inner:
                if not isinstance(value, list):
                    story = f"key {name!r} is {type(value).__name__}, not a list"
                    raise BadRecord("no text", story)
            inner = [element for value in inner for element in value]
        found = inner
    for value in found:
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            name = ".".join(wanted.path)
            raise BadRecord("no text", f"key {name!r} is {type(value).__name__}, not text")
    return "\n".join(str(value) for value in found)
