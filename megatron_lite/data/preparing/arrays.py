"""A JSON array as records: element by element, never more than one beyond a batch in memory."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO

from megatron_lite.config.errors import DataError
from megatron_lite.data.preparing.parts import InputPart, InputPlace, RecordBatch, too_long
from megatron_lite.data.preparing.streams import open_stream


def read_array(
    part: InputPart, batch_bytes: int, place: InputPlace, longest: int
) -> Iterator[RecordBatch]:
    """The elements of a JSON array, one line each; at most a few elements beyond a batch in memory.

    Newlines between the parts of a pretty-printed element become spaces: inside strings JSON
    allows none.
    """
    with ExitStack() as stack:
        stream, raw = open_stream(part.path, stack)
        elements = array_elements(part.path, stream, batch_bytes, longest)
        for _ in range(place.position):
            next(elements, None)
        done, position = 0, place.position
        while True:
            lines: list[bytes] = []
            numbers: list[int] = []
            size = 0
            for number, text in elements:
                lines.append(text.encode("utf-8").replace(b"\n", b" ").replace(b"\r", b" "))
                numbers.append(number)
                size += len(lines[-1])
                if size >= batch_bytes:
                    break
            if not lines:
                return
            position += len(lines)
            read, done = raw.tell() - done, raw.tell()
            yield RecordBatch(
                part.path,
                numbers[0],
                InputPlace(place.part, position),
                read,
                b"\n".join(lines),
                numbers=tuple(numbers),
            )


def array_elements(
    path: str, stream: IO[bytes], block: int, longest: int
) -> Iterator[tuple[int, str]]:
    """(line, text) of every element of a JSON array; longest: bytes one may have."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    scanner = json.JSONDecoder()
    text, at, line, ended = "", 0, 1, False

    def refuse(what: str, position: int) -> DataError:
        number = line + text.count("\n", 0, position)
        start = text[position : position + 80]
        return DataError(
            f"{path}:{number}: {what} - a JSON array that is broken cannot be read on; "
            f"mend it here: {start}"
        )

    def more() -> bool:
        """Read on, dropping what was used; False at the end of the file."""
        nonlocal text, at, line, ended
        if len(text) - at > longest:
            raise refuse(too_long(longest).story, at)
        data = stream.read(max(min(block, longest), 2 * (len(text) - at)))
        ended = not data
        line += text.count("\n", 0, at)
        try:
            text, at = text[at:] + decode(data, ended), 0
        except UnicodeDecodeError as error:
            raise refuse(f"no UTF-8 ({error.reason})", 0) from error
        return not ended

    def next_character() -> str:
        """The next character that is no space, "" at the end."""
        nonlocal at
        while True:
            while at < len(text) and text[at] in " \t\r\n\ufeff":
                at += 1
            if at < len(text):
                return text[at]
            if not more():
                return ""

    assert next_character() == "[", "only files that begin with a bracket are read as arrays"
    at += 1
    for count in itertools.count():
        character = next_character()
        if character == "]":
            break
        if count:
            if character != ",":
                raise refuse("no comma between two elements, or the array does not end", at)
            at += 1
            next_character()
        while True:
            try:
                _, end = scanner.raw_decode(text, at)
                break
            except (json.JSONDecodeError, RecursionError) as error:
                cut_off = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated") or error.pos >= len(text) - 16
                )
                if not cut_off or not more():
                    raise refuse(f"no JSON ({error})", at) from error
        if end - at > longest:
            raise refuse(too_long(longest).story, at)
        yield line + text.count("\n", 0, at), text[at:end]
        at = end
    at += 1
    if next_character():
        raise refuse("something follows the array", at)
