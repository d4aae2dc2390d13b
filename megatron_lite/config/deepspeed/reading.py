"""A ds.json as values with their lines: JSON, and of Hjson comments, trailing commas and keys without quotes.

DeepSpeed reads Hjson, whose text without quotes ends with its line, commas and comments included: that
part is refused, as it does not mean what it looks like.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_lite.config.errors import ConfigError

_DEPTH = 40
_SPACE = re.compile(r"(?:\s+|//[^\n]*|#[^\n]*|/\*.*?\*/)*", re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![\w.])")
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_TEXT = re.compile(r'"((?:[^"\\\n]|\\.)*)"|\'((?:[^\'\\\n]|\\.)*)\'')
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)")
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_WORDS = {"true": True, "false": False, "null": None}
_PYTHON = {"True": "true", "False": "false", "None": "null"}


@dataclass(frozen=True, slots=True)
class FileValue:
    """A value of the file; of an object a dict of such values by key."""

    value: object
    line: int

    def plain(self) -> object:
        """The value without lines."""
        if isinstance(self.value, dict):
            return {key: inner.plain() for key, inner in self.value.items()}
        if isinstance(self.value, list):
            return [inner.plain() for inner in self.value]
        return self.value


def read_config(where: str) -> tuple[FileValue, str]:
    """The root object and the file's name; `where` is a path or, as DeepSpeed takes it, base64 of the text."""
    path = Path(where)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        inline = _decoded(where)
        if inline is None:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(
                f"--deepspeed_config {where[:200]}: cannot be read ({reason}), and it is no "
                f"base64 of "
                "a JSON object either"
            ) from None
        return read_hjson(inline, "base64"), "base64"
    return read_hjson(text, where), where


def _decoded(word: str) -> str | None:
    """The text of a base64 word that holds an object."""
    try:
        text = base64.b64decode(word, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None
    return text if text.lstrip().startswith("{") else None


def read_hjson(text: str, name: str) -> FileValue:
    """The root object of a text; ConfigError with name:line for what is none."""
    reader = _Reader(text, name)
    reader.skip()
    if reader.peek() != "{":
        reader.fail("a DeepSpeed configuration is one object in braces")
    root = reader.value(0)
    reader.skip()
    if reader.at < len(text):
        reader.fail("the object ends before this")
    return root


class _Reader:
    """A place in the text; each method reads one thing and stands behind it."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name, self.at = text, name, 0

    def line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def fail(self, what: str) -> NoReturn:
        found = self.text[self.at : self.at + 20].partition("\n")[0]
        raise ConfigError(
            f"{self.name}:{self.line()}: not valid JSON: {what}; found {found!r}"
            if found
            else f"{self.name}:{self.line()}: not valid JSON: {what}; the line or the text ends here"
        )

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def skip(self) -> None:
        """Pass over blanks and comments."""
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        if self.text.startswith("/*", self.at):
            self.fail("a comment /* has no end")

    def value(self, depth: int) -> FileValue:
        if depth > _DEPTH:
            self.fail(f"more than {_DEPTH} levels")
        line = self.line()
        if self.peek() == "{":
            return FileValue(self._object(depth), line)
        if self.peek() == "[":
            return FileValue(self._array(depth), line)
        return FileValue(self._one(), line)

    def _object(self, depth: int) -> dict[str, FileValue]:
        found: dict[str, FileValue] = {}
        self.at += 1
        while not self._ends("}"):
            line, at = self.line(), self.at
            key = self._key()
            if key in found:
                self.at = at
                self.fail(f"the key {key} stands at line {found[key].line} already")
            self.skip()
            if self.peek() != ":":
                self.fail(f"a colon belongs behind {key!r}")
            self.at += 1
            self.skip()
            found[key] = FileValue(self.value(depth + 1).value, line)
            self._comma("}")
        return found

    def _array(self, depth: int) -> list[FileValue]:
        found = []
        self.at += 1
        while not self._ends("]"):
            found.append(self.value(depth + 1))
            self._comma("]")
        return found

    def _ends(self, bracket: str) -> bool:
        """Whether the object or the array ends here; stands behind it then."""
        self.skip()
        if self.peek() != bracket:
            return False
        self.at += 1
        return True

    def _comma(self, bracket: str) -> None:
        """Between two entries: a comma, or as in Hjson a new line; one before the bracket is no matter."""
        before = self.line()
        self.skip()
        if self.peek() == ",":
            self.at += 1
        elif self.peek() != bracket and self.line() == before:
            self.fail(f"a comma or {bracket} belongs here")

    def _key(self) -> str:
        if self.peek() in ('"', "'"):
            return self._quoted()
        match = _NAME.match(self.text, self.at)
        if match is None:
            self.fail("a key belongs here")
        self.at = match.end()
        return match[0]

    def _one(self) -> object:
        if self.peek() in ('"', "'"):
            return self._quoted()
        number = _NUMBER.match(self.text, self.at)
        if number is not None:
            value = float(number[0])
            if not math.isfinite(value):
                self.fail("a number must be finite")
            self.at = number.end()
            return int(number[0]) if number[0].lstrip("-").isdigit() else value
        word = _NAME.match(self.text, self.at)
        if word is not None and word[0] in _WORDS:
            self.at = word.end()
            return _WORDS[word[0]]
        if word is not None and word[0] in _PYTHON:
            self.fail(f"write {_PYTHON[word[0]]}")
        self.fail("a value belongs here, text in quotes")

    def _quoted(self) -> str:
        match = _TEXT.match(self.text, self.at)
        if match is None:
            self.fail("the text in quotes has no end in its line")
        self.at = match.end()
        inside = match[1] if match[1] is not None else match[2]
        return _ESCAPE.sub(
            lambda m: chr(int(m[1][1:], 16)) if len(m[1]) == 5 else _ESCAPED.get(m[1], m[1]), inside
        )
