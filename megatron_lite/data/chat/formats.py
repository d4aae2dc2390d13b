"""Built-in formats of a conversation: which special tokens stand where among which texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_lite.config.errors import DataError

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """What somebody said; role: one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Special:
    """A special token, by its text, or by what it is for: "bos" and "eos" are in every vocabulary."""

    name: str


ChatPiece = str | Special
BOS, EOS = Special("bos"), Special("eos")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """pieces: those of a conversation that an answer follows; needs: special tokens by their text.

    ends: what ends an answer.
    """

    pieces: Callable[[Sequence[Message]], Iterator[ChatPiece]]
    needs: tuple[str, ...] = ()
    ends: tuple[Special, ...] = (EOS,)


def _chatml(messages: Sequence[Message]) -> Iterator[ChatPiece]:
    begin, end = Special("<|im_start|>"), Special("<|im_end|>")
    for message in messages:
        yield from (begin, f"{message.role}\n{message.content}", end, "\n")
    yield from (begin, "assistant\n")


def _llama_3(messages: Sequence[Message]) -> Iterator[ChatPiece]:
    begin, end = Special("<|start_header_id|>"), Special("<|end_header_id|>")
    yield BOS
    for message in messages:
        yield from (
            begin,
            message.role,
            end,
            f"\n\n{message.content.strip()}",
            Special("<|eot_id|>"),
        )
    yield from (begin, "assistant", end, "\n\n")


def _llama_2(messages: Sequence[Message]) -> Iterator[ChatPiece]:
    """Its system text stands inside of the first question."""
    system = "".join(m.content for m in messages if m.role == "system")
    first = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    for message in messages:
        if message.role == "user":
            yield from (BOS, f"[INST] {first}{message.content.strip()} [/INST]")
            first = ""
        elif message.role == "assistant":
            yield from (f" {message.content.strip()} ", EOS)


def _plain(messages: Sequence[Message]) -> Iterator[ChatPiece]:
    """prompt <bos> answer <eos>; a system text begins the first prompt."""
    for message in messages:
        yield message.content
        if message.role == "system":
            yield "\n"
        else:
            yield BOS if message.role == "user" else EOS


_CHATML = ("<|im_start|>", "<|im_end|>")
_LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

CHAT_FORMATS: dict[str, ChatFormat] = {
    "chatml": ChatFormat(_chatml, _CHATML, (EOS, Special("<|im_end|>"))),
    "llama-3": ChatFormat(_llama_3, _LLAMA_3, (EOS, Special("<|eot_id|>"))),
    "llama-2": ChatFormat(_llama_2),
    "plain": ChatFormat(_plain),
}
"""--chat-template -> the format."""


def check_messages(messages: Sequence[Message]) -> None:
    """A system text first, if there is one; then questions and answers in turn, a question last."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    wanted: list[Literal["user", "assistant"]] = ["user", "assistant"]
    for number, message in enumerate(turns):
        if message.role != wanted[number % 2]:
            raise DataError(
                f"message {number + 1 + len(messages) - len(turns)} is of {message.role}, where "
                f"{wanted[number % 2]} is expected: a system text first, then user and assistant in turn"
            )
    if len(turns) % 2 == 0:
        raise DataError("the last message must be of user: the assistant answers it")
