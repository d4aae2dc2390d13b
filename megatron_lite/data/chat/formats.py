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
    """pieces: those of a conversation; True: up to where the next answer begins.

    jinja: the same as a template, for whoever exports a model.
    needs: special tokens by their text; ends: what ends an answer.
    """

    pieces: Callable[[Sequence[Message], bool], Iterator[ChatPiece]]
    jinja: str
    needs: tuple[str, ...] = ()
    ends: tuple[Special, ...] = (EOS,)


def _chatml(messages: Sequence[Message], asks: bool) -> Iterator[ChatPiece]:
    begin, end = Special("<|im_start|>"), Special("<|im_end|>")
    for message in messages:
        yield from (begin, f"{message.role}\n{message.content}", end, "\n")
    if asks:
        yield from (begin, "assistant\n")


def _llama_3(messages: Sequence[Message], asks: bool) -> Iterator[ChatPiece]:
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
    if asks:
        yield from (begin, "assistant", end, "\n\n")


def _llama_2(messages: Sequence[Message], asks: bool) -> Iterator[ChatPiece]:
    """Its system text stands inside of the first question."""
    system = "".join(m.content for m in messages if m.role == "system")
    first = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    for message in messages:
        if message.role == "user":
            yield from (BOS, f"[INST] {first}{message.content.strip()} [/INST]")
            first = ""
        elif message.role == "assistant":
            yield from (f" {message.content.strip()} ", EOS)


def _plain(messages: Sequence[Message], asks: bool) -> Iterator[ChatPiece]:
    """prompt <bos> answer <eos>; a system text begins the first prompt."""
    for message in messages:
        yield message.content
        if message.role == "system":
            yield "\n"
        else:
            yield BOS if message.role == "user" else EOS


_CHATML = ("<|im_start|>", "<|im_end|>")
_LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

_CHATML_JINJA = (
    r"{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA_3_JINJA = (
    r"{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    r"'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    r"{% if add_generation_prompt %}"
    r"{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_LLAMA_2_JINJA = (
    r"{% set ns = namespace(first='') %}{% for m in messages %}"
    r"{% if m['role'] == 'system' %}{% if m['content'] %}"
    r"{% set ns.first = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}{% endif %}"
    r"{% elif m['role'] == 'user' %}"
    r"{{ bos_token + '[INST] ' + ns.first + m['content'] | trim + ' [/INST]' }}"
    r"{% set ns.first = '' %}"
    r"{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_PLAIN_JINJA = (
    r"{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'system' %}{{ '\n' }}"
    r"{% elif m['role'] == 'user' %}{{ bos_token }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
)

CHAT_FORMATS: dict[str, ChatFormat] = {
    "chatml": ChatFormat(_chatml, _CHATML_JINJA, _CHATML, (EOS, Special("<|im_end|>"))),
    "llama-3": ChatFormat(_llama_3, _LLAMA_3_JINJA, _LLAMA_3, (EOS, Special("<|eot_id|>"))),
    "llama-2": ChatFormat(_llama_2, _LLAMA_2_JINJA),
    "plain": ChatFormat(_plain, _PLAIN_JINJA),
}
"""--chat-template -> the format."""


def check_messages(messages: Sequence[Message]) -> None:
    """A system text first, if there is one; then questions and answers in turn, a question last."""
    turns = check_turns(messages)
    if len(turns) % 2 == 0:
        raise DataError("the last message must be of user: the assistant answers it")


def check_turns(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages behind the system text: questions and answers in turn, or DataError."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    wanted: list[Literal["user", "assistant"]] = ["user", "assistant"]
    for number, message in enumerate(turns):
        if message.role != wanted[number % 2]:
            raise DataError(
                f"message {number + 1 + len(messages) - len(turns)} is of {message.role}, where "
                f"{wanted[number % 2]} is expected: a system text first, then user and assistant in turn"
            )
    return turns
