"""Texts that are to be continued: of the command line, of files, of stdin."""

from __future__ import annotations

import argparse
import sys

from megatron_lite.config.errors import ConfigError
from megatron_lite.storage.reading import read_plain

_MOST_BYTES = 1 << 28
"""Of a file of prompts."""

_FILE = "FILE:"


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Where the prompts are from."""
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", nargs="+", action="extend", help="texts to continue")
    group.add_argument("--prompt-file", help="one prompt a line, empty lines left out; - is stdin")
    group.add_argument(
        "--start", metavar="TEXT|FILE:F", help="one more text, or a whole file as one text"
    )


def prompts_of(asked: argparse.Namespace) -> list[str]:
    """All prompts, those of --prompt first; an empty one where there is none."""
    found = [_text("--prompt", prompt) for prompt in asked.prompt or []]
    if asked.prompt_file is not None:
        found += _lines(asked.prompt_file)
    if asked.start is not None:
        found.append(_start(asked.start))
    return found or [""]


def _text(flag: str, prompt: str) -> str:
    """The prompt as it was typed, in UTF-8; a locale without UTF-8 hands its bytes over one by one."""
    try:
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag} {prompt!r} is not UTF-8 ({error.reason})") from None


def _read(flag: str, path: str) -> bytes:
    try:
        return read_plain(path, _MOST_BYTES).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ConfigError(
            f"{flag} {path} cannot be read: {error.strerror} - a pipe goes to `--prompt-file -`"
        ) from None


def _start(given: str) -> str:
    """The text, or that of the file, all of it."""
    if not given.startswith(_FILE):
        return _text("--start", given)
    path = given.removeprefix(_FILE)
    try:
        return _read(f"--start {_FILE}", path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--start {given}: byte {error.start} is not UTF-8 ({error.reason}): save it as UTF-8"
        ) from None


def _lines(path: str) -> list[str]:
    """The lines of --prompt-file."""
    content = sys.stdin.buffer.read() if path == "-" else _read("--prompt-file", path)
    prompts = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            prompts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"--prompt-file {path}:{number} is not UTF-8 ({error.reason}): save it as UTF-8"
            ) from None
    found = [prompt for prompt in prompts if prompt]
    if not found:
        raise ConfigError(f"--prompt-file {path} holds no prompt: write one a line")
    return found
