"""The chat template that comes with a model, as Hugging Face keeps it, and how it is rendered.

A template is a program of somebody else's: it runs in a process of its own (sandbox.py) that is
ended where it takes too long, and restarted for the next.
"""

from __future__ import annotations

import importlib.util
import json
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.extras import how_to_install
from megatron_lite.data.tokenizers.huggingface import BESIDE, GENERATION, TEMPLATE, token_name
from megatron_lite.storage.reading import read_plain

_LARGEST = 1 << 20
"""Bytes of a file that holds a template."""


_START_SECONDS = 60.0
"""Until the process must be there."""


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What a template may take: seconds of a rendering, characters written, bytes of memory."""

    seconds: float = 10.0
    characters: int = 4 << 20
    memory: int = 1 << 30


class TemplateText(NamedTuple):
    """What a template wrote; has_blocks: it says by {% generation %} what the assistant's is."""

    text: str
    has_blocks: bool


@dataclass(slots=True)
class Sandbox:
    """The process in which templates are rendered; started when it is first needed."""

    limits: TemplateLimits = field(default_factory=TemplateLimits)
    _process: subprocess.Popen[bytes] | None = None

    def render(
        self,
        template: str,
        variables: Mapping[str, Any] | None,
        where: str,
        marks: tuple[str, str] = ("", ""),
    ) -> TemplateText:
        """DataError where the template fails, or takes more than it may.

        variables: None reads the template and renders nothing, for what is wrong with it as it stands.
        marks: written before and behind what stands in a generation block.
        """
        asked = {"template": template, "variables": variables, "marks": marks,
                 "longest": self.limits.characters}  # fmt: skip
        answer = self._asked(json.dumps(asked).encode() + b"\n", where)
        if "error" in answer:
            raise DataError(
                f"{where}: the chat template cannot be rendered: {answer['error']} - correct it, or "
                "choose another with --chat-template"
            )
        return TemplateText(str(answer["text"]), bool(answer["blocks"]))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _asked(self, line: bytes, where: str) -> dict[str, Any]:
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = self._line(process, self.limits.seconds)
        except BrokenPipeError:
            answer = b""
        if answer is None:
            self.close()
            return {"error": f"it takes more than {self.limits.seconds:g} seconds"}
        if not answer.endswith(b"\n"):
            self.close()
            return {"error": "its process died"}
        found: dict[str, Any] = json.loads(answer)
        return found

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """What it answers, cut off where it ended; None where that takes too long."""
        assert process.stdout is not None
        end, answer = time.monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not answer.endswith(b"\n"):
                if not selector.select(max(end - time.monotonic(), 0.0)):
                    return None
                part = process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
                if not part:
                    break
                answer += part
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        if importlib.util.find_spec("jinja2") is None:
            raise ConfigError(
                "the model's chat template needs the package `jinja2`: "
                f"{how_to_install('chat')}; or choose a built-in one with --chat-template"
            )
        words = [sys.executable, "-I", str(Path(__file__).with_name("sandbox.py"))]
        process = subprocess.Popen(
            [*words, str(self.limits.memory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._line(
            process, _START_SECONDS
        )  # it is there: what a rendering takes is counted from here
        return process


def template_of(folder: Path) -> tuple[str, Path] | None:
    """The template that lies in a folder of tokenizer files, and the file it is from; None without one."""
    file = folder / TEMPLATE
    if file.is_file():
        return template_file(file), file
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_object(folder / name).get("chat_template")
        if isinstance(found, list):  # several by name
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found, folder / name
    return None


def template_file(path: Path) -> str:
    """The template in a file of its own."""
    try:
        return read_plain(path, _LARGEST).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.reason if isinstance(error, UnicodeDecodeError) else error.strerror
        raise DataError(f"{path}, the chat template, cannot be read: {why}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; an empty one where there is no file."""
    try:
        found = json.loads(read_plain(path, 16 * _LARGEST))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} must hold one JSON object")
    return found


def named_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token and so on, as the files beside a tokenizer name them."""
    found: dict[str, str] = {}
    for name in BESIDE:
        path = folder / name
        for kind in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = token_name(read_object(path), kind, path)
            if token is not None:
                found.setdefault(kind, token)
    return found


def ends_of_generation(folder: Path, ids: int) -> frozenset[int]:
    """Ids below `ids` after which a model has nothing more to say, by its generation_config.json."""
    found = read_object(folder / GENERATION).get("eos_token_id")
    listed: Sequence[Any] = found if isinstance(found, list) else [found]
    return frozenset(n for n in listed if type(n) is int and 0 <= n < ids)
