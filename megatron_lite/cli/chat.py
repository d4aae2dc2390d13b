"""Talk with a trained model in the terminal: of a checkpoint, or of a folder of Hugging Face's.

python tools/chat.py --load HUGGING_FACE_FOLDER
python tools/chat.py --load RUN_FOLDER --system "You answer briefly." --chat-template plain --temperature 0

    /reset            forget what was said
    /system TEXT      another system text, and forget what was said; without TEXT none
    /save FILE        write what was said as JSON
    /help             these commands
    /exit             end; so does the end of the input
    //TEXT            a message that begins with a slash

Ctrl-C ends an answer.  What the model says goes to stdout, all else to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from megatron_lite.cli.speaking.model import (
    Speaker,
    TriedTemplate,
    add_cache_flags,
    add_chat_flags,
    add_model_flags,
    add_sampling_flags,
    load_speaker,
    sampling_of,
    settle_cache,
)
from megatron_lite.config.context_length import beyond_trained
from megatron_lite.config.errors import ConfigError, DataError, StorageError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.extensions import extend
from megatron_lite.data.chat.conversation import Renderer
from megatron_lite.data.chat.formats import Message
from megatron_lite.inference.generate import Generation, TextRequest
from megatron_lite.inference.sampling import Sampler, Sampling
from megatron_lite.inference.texts import TextStream
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rendezvous.launch import choose_device, read_launch
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.outputs import check_outputs, write_output


def main() -> int:
    """Load, and talk until the input ends."""
    asked, settings = _parse(sys.argv[1:])
    launch = read_launch()
    if launch.world_size > 1:
        raise ConfigError(
            f"{launch.world_size} ranks were started, but one terminal talks with one: start tools/chat.py "
            "alone; tools/generate.py answers over several"
        )
    ctx = ParallelContext.serial(choose_device(launch, use_cpu=asked.use_cpu, backend=None))
    begun = [Message("system", asked.system)] if asked.system else []
    template = TriedTemplate(asked, [*begun, Message("user", "hello")])
    speaker = load_speaker(asked, ctx, template.look)
    renderer = template.renderer
    _say(f"chat template: {renderer.name}; /help /reset /system /save /exit")
    generation = Generation(
        speaker.model, keep=asked.cache_tokens, start=asked.sink_tokens, remember=True
    )
    chat = Chat(asked, settings, speaker, renderer, generation, asked.system)
    try:
        while chat.take(_line()):
            pass
    finally:
        renderer.sandbox.close()
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _line() -> str | None:
    """What is typed next; None at the end of the input."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\r\n").removeprefix("\ufeff") if line else None


@dataclass(slots=True)
class Chat:
    """A conversation, and what is needed to continue it."""

    asked: argparse.Namespace
    settings: Sampling
    speaker: Speaker
    renderer: Renderer
    generation: Generation
    system: str | None
    turns: list[Message] = field(default_factory=list)
    warned: bool = False

    @property
    def messages(self) -> list[Message]:
        """All that was said, the system text first."""
        return [*([Message("system", self.system)] if self.system else []), *self.turns]

    def take(self, line: str | None) -> bool:
        """A line was typed; False where it ends the conversation."""
        if line is None:
            return False
        if line.startswith("/") and not line.startswith("//"):
            return self._command(*line[1:].partition(" ")[::2])
        text = line[1:] if line.startswith("//") else line
        if text.strip():
            self._answer(_utf8(text))
        return True

    def _command(self, name: str, rest: str) -> bool:
        commands: dict[str, Callable[[str], None]] = {
            "reset": self._reset, "system": self._system, "save": self._save, "help": self._help,
        }  # fmt: skip
        if name == "exit":
            return False
        if name in commands:
            commands[name](rest.strip())
        else:
            known = ", ".join(f"/{known}" for known in (*commands, "exit"))
            _say(f"/{name} is no command: {known}; //{name} sends it as it is")
        return True

    def _help(self, rest: str) -> None:
        assert __doc__ is not None
        _say(__doc__.split("\n\n")[2])

    def _reset(self, rest: str) -> None:
        self.turns.clear()
        _say("forgotten")

    def _system(self, rest: str) -> None:
        self.system = _utf8(rest) or None
        self.turns.clear()
        _say("another system text" if self.system else "no system text")

    def _save(self, path: str) -> None:
        said = {"messages": [message._asdict() for message in self.messages]}
        try:
            check_outputs("/save", [path], Disk())
            write_output(path, json.dumps(said, ensure_ascii=False, indent=2).encode(), Disk())
        except (ConfigError, StorageError) as error:
            _say(f"not saved: {error}")
        else:
            _say(f"{len(said['messages'])} messages in {path}")

    def _answer(self, text: str) -> None:
        """The model answers, word by word; an answer that was broken off is kept as far as it came."""
        self.turns.append(Message("user", text))
        try:
            ids = self.renderer.ids(self.messages)
        except DataError as error:
            self.turns.pop()  # what was said before stays, to be continued or saved
            _say(f"not sent: {error}")
            return
        self._warn_beyond(len(ids))
        stream = TextStream(self.speaker.tokenizer, ids)

        def heard(generated: Sequence[int]) -> bool:
            print(stream.add(generated[-1]), end="", flush=True)
            return False

        sampler = Sampler(
            self.settings, self.speaker.tokenizer.vocab_size, self.asked.seed, len(self.turns)
        )
        request = TextRequest(
            ids, self.asked.max_new_tokens, sampler, ends=self.renderer.ends, until=heard
        )
        end = None
        # Ctrl-C ends this answer, not the conversation
        with contextlib.suppress(KeyboardInterrupt):
            for token in self.generation.run([request]):
                end = token.end
        print(stream.finish(), flush=True)
        self.turns.append(Message("assistant", stream.text))
        if end == "positions":
            positions = self.speaker.model.context.model.num_positions
            _say(f"the conversation has filled the model's {positions} positions: /reset")
        elif end == "length":
            _say(f"cut off after --max-new-tokens {self.asked.max_new_tokens}")

    def _warn_beyond(self, tokens: int) -> None:
        """Once, when so many are more than the model was trained for."""
        kept = min(tokens, self.asked.cache_tokens or tokens)
        warning = beyond_trained(self.speaker.model.context.model, kept)
        if warning is not None and not self.warned:
            self.warned = True
            _say(f"WARNING: the conversation: {warning}; /reset begins anew")


def _utf8(text: str) -> str:
    """The text as it was typed; a locale without UTF-8 hands its bytes over one by one."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Sampling]:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add = parser.add_argument_group("conversation").add_argument
    add("--system", metavar="TEXT", help="what the model is told before the conversation")
    add_chat_flags(add)
    add("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (%(default)s)")
    add_sampling_flags(parser)
    add_cache_flags(parser)
    asked = parser.parse_args(argv)
    extend(asked.extend)
    settle_cache(asked)
    if asked.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {asked.max_new_tokens} must be at least 1")
    return asked, sampling_of(asked)


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, results=True))


if __name__ == "__main__":
    start()
