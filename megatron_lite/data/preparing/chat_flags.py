"""The flags that make samples of conversations, and the job that they say."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron_lite.config.errors import ConfigError
from megatron_lite.data.chat.formats import CHAT_FORMATS
from megatron_lite.data.preparing.chat_encode import ChatJob
from megatron_lite.data.preparing.dialogues import AUTO_SHAPE, SHAPES, AskedBy

_ONLY_CHAT = ("chat_template", "chat_user", "chat_assistant", "chat_system", "seq_length")
_NOT_CHAT = ("template", "append_eod", "text_unit")


def add_chat_input_flags(add: Callable[..., Any]) -> None:
    """Through add_argument of a parser or a group."""
    add(
        "--chat",
        action="store_true",
        help="records are conversations; of their tokens the answers are learned, by a mask beside "
        "them, for --objective sft",
    )
    add(
        "--chat-template", metavar="NAME|FILE",
        help=f"{', '.join(CHAT_FORMATS)}, or a file in Jinja; by default the one beside the tokenizer",
    )  # fmt: skip
    add(
        "--chat-shape",
        choices=[AUTO_SHAPE, *SHAPES],
        default=AUTO_SHAPE,
        help="how records hold them; auto goes by each one's keys",
    )
    add("--chat-user", metavar="TEMPLATE", help="question of any other record, as '{title}'")
    add("--chat-assistant", metavar="TEMPLATE", help="its answer, as '{summary}\\n{text?}'")
    add("--chat-system", metavar="TEMPLATE", help="a system text before them, '{}' or not")
    add("--seq-length", type=int, help="of the training: longer samples are cut, and counted")


def chat_job(asked: argparse.Namespace) -> ChatJob | None:
    """None without --chat; ConfigError for flags that do not go together."""
    if not asked.chat:
        for name in _ONLY_CHAT:
            if getattr(asked, name) is not None:
                raise ConfigError(f"{_flag(name)} is about conversations: it needs --chat")
        if asked.chat_shape != AUTO_SHAPE:
            raise ConfigError("--chat-shape is about conversations: it needs --chat")
        return None
    for name in _NOT_CHAT:
        if getattr(asked, name):
            raise ConfigError(f"{_flag(name)} is about texts: leave it out with --chat")
    if asked.json_keys != ["text"]:
        raise ConfigError(
            "--json-keys is about texts: with --chat give --chat-shape or --chat-user"
        )
    if asked.seq_length is not None and asked.seq_length < 1:
        raise ConfigError(f"--seq-length {asked.seq_length} must be at least 1")
    return ChatJob(asked.chat_template, asked.chat_shape, _recipe(asked), asked.seq_length)


def _recipe(asked: argparse.Namespace) -> AskedBy | None:
    user, assistant, system = asked.chat_user, asked.chat_assistant, asked.chat_system
    if user is None and assistant is None and system is None:
        return None
    if user is None or assistant is None:
        raise ConfigError(
            "--chat-user and --chat-assistant say a question and its answer: give both"
        )
    if asked.chat_shape != AUTO_SHAPE:
        raise ConfigError(
            f"--chat-shape {asked.chat_shape} and --chat-user exclude each other; give one"
        )
    return AskedBy(user, assistant, system)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
