"""Records of conversations, in the shapes that people keep them in, become messages.

{"messages": [{"role": "user", "content": "Hi"}, ...]}                    messages
{"conversations": [{"from": "human", "value": "Hi"}, ...]}                sharegpt
{"instruction": "Add.", "input": "1 2", "output": "3"}                    alpaca (Belle's, too)
{"prompt": "Hi", "answer": "Hello"}, also as a row of a table             prompt-answer
any other                                      --chat-user '{title}' --chat-assistant '{text}'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_lite.config.errors import ConfigError
from megatron_lite.data.chat.formats import Message
from megatron_lite.data.chat.lessons import Dialogue
from megatron_lite.data.preparing.records import BadRecord, Template, check_text

AUTO_SHAPE = "auto"
OWN_SHAPE = "own"


@dataclass(frozen=True, slots=True)
class AskedBy:
    """One question and its answer as templates of a record (see Template), and perhaps a system text."""

    user: str
    assistant: str
    system: str | None = None


class Asking:
    """Reads records by a recipe."""

    def __init__(self, recipe: AskedBy, *, history: bool = False) -> None:
        self._user = Template(recipe.user, "--chat-user")
        self._assistant = Template(recipe.assistant, "--chat-assistant")
        self._system = None
        if recipe.system is not None:
            self._system = Template(recipe.system, "--chat-system", constant=True)
        self._history = history

    @property
    def columns(self) -> list[str]:
        """The keys that are looked at."""
        templates = [self._user, self._assistant, *([self._system] if self._system else [])]
        return list(dict.fromkeys(name for one in templates for name in one.columns))

    def __call__(self, record: dict[str, Any]) -> Dialogue:
        """What was said before, a question, its answer."""
        system = "" if self._system is None else self._system.fill(record)
        before = _pairs(record.get("history")) if self._history else []
        asked = Message("user", self._user.fill(record))
        answer = Message("assistant", self._assistant.fill(record))
        return _dialogue(system, [*before, asked, answer], {})


def _pairs(history: Any) -> list[Message]:
    """Questions and answers of earlier turns, [[question, answer], ...]."""
    found: list[Message] = []
    for pair in history or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecord("no messages", "its history is no list of [question, answer]")
        found += [Message("user", _text(pair[0])), Message("assistant", _text(pair[1]))]
    return found


_OPENAI = ("role", "content")
_SHAREGPT = ("from", "value")
_ROLES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant",
}  # fmt: skip


def _messages(key: str, names: tuple[str, str]) -> Callable[[dict[str, Any]], Dialogue]:
    def read(record: dict[str, Any]) -> Dialogue:
        listed = record.get(key)
        if not isinstance(listed, list):
            raise BadRecord("no messages", f"its {key!r} is {type(listed).__name__}, not a list")
        said, weights = [], {}
        for number, one in enumerate(listed):
            if not isinstance(one, dict) or any(name not in one for name in names):
                what = f"message {number + 1} of its {key!r} has no {names[0]!r} and {names[1]!r}"
                raise BadRecord("no messages", what)
            role = _ROLES.get(one[names[0]]) if isinstance(one[names[0]], str) else None
            if role is None:
                what = f"message {number + 1} is of {one[names[0]]!r}, not of {', '.join(_ROLES)}"
                raise BadRecord("unknown role", what)
            said.append(Message(role, _text(one[names[1]])))
            weights[number] = _weight(one.get("weight"), number)
        system = record.get("system") if key != "messages" else None
        return _dialogue(_text(system) if system else "", said, weights)

    return read


def _weight(found: Any, number: int) -> bool:
    """OpenAI's: 0 for an answer that is only read."""
    if found not in (None, 0, 1):
        raise BadRecord("no messages", f"message {number + 1} has the weight {found!r}, not 0 or 1")
    return bool(found != 0)


def _text(content: Any) -> str:
    """A text, or OpenAI's list of parts that are texts."""
    if isinstance(content, list):
        parts: list[Any] = [p.get("text") if isinstance(p, dict) else p for p in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise BadRecord("no text", f"a message is {type(content).__name__}, not text")
    return check_text(content, "a message")


def _dialogue(system: str, said: list[Message], weights: dict[int, bool]) -> Dialogue:
    """Messages without an empty system text before them and a question that has no answer behind them.

    An answer is learned unless its weight says no, or it is blank.
    """
    learned = {
        number
        for number, message in enumerate(said)
        if message.role == "assistant" and weights.get(number, True) and message.content.strip()
    }
    first = int(bool(said) and said[0].role == "system" and not said[0].content.strip())
    if said and said[0].role == "system" and system.strip() and not first:
        if said[0].content.strip() != system.strip():
            raise BadRecord(
                "two system texts", "its messages have another system text than its 'system'"
            )
        first = 1
    last = len(said)
    while last > first and said[last - 1].role == "user":
        last -= 1
    front = [Message("system", check_text(system, "a message"))] if system.strip() else []
    shift = len(front) - first
    messages = [*front, *said[first:last]]
    return Dialogue(tuple(messages), frozenset(number + shift for number in learned))


@dataclass(frozen=True, slots=True)
class Shape:
    """needs: the keys it is told by; read: a record as a conversation; columns: those looked at."""

    needs: tuple[str, ...]
    read: Callable[[dict[str, Any]], Dialogue]
    columns: tuple[str, ...]


def _asking(recipe: AskedBy, *needs: str, history: bool = False) -> Shape:
    asking = Asking(recipe, history=history)
    return Shape(needs, asking, (*asking.columns, *(["history"] if history else [])))


SHAPES: dict[str, Shape] = {
    "messages": Shape(("messages",), _messages("messages", _OPENAI), ("messages",)),
    "sharegpt": Shape(("conversations",), _messages("conversations", _SHAREGPT),
                      ("conversations", "system")),
    "alpaca": _asking(AskedBy("{instruction?}\n{input?}", "{output}", "{system?}"),
                      "instruction", "output", history=True),
    "prompt-answer": _asking(AskedBy("{prompt}", "{answer}", "{system?}"), "prompt", "answer"),
    "prompt-completion": _asking(AskedBy("{prompt}", "{completion}", "{system?}"),
                                 "prompt", "completion"),
    "prompt-response": _asking(AskedBy("{prompt}", "{response}", "{system?}"), "prompt", "response"),
    "question-answer": _asking(AskedBy("{question}", "{answer}", "{system?}"), "question", "answer"),
}  # fmt: skip
"""--chat-shape -> how a record of it is read."""


class Dialogues:
    """Records as conversations: of one shape, of a recipe of the user's, or each of the one it looks like."""

    def __init__(self, shape: str = AUTO_SHAPE, recipe: AskedBy | None = None) -> None:
        self._shape: Shape | None = None
        if recipe is not None:
            self._shape = _asking(recipe)
        elif shape != AUTO_SHAPE:
            if shape not in SHAPES:
                raise ConfigError(f"--chat-shape {shape} is none of auto, {', '.join(SHAPES)}")
            self._shape = SHAPES[shape]

    @property
    def columns(self) -> list[str]:
        """The top-level keys that are looked at."""
        shapes = SHAPES.values() if self._shape is None else [self._shape]
        return list(dict.fromkeys(name for shape in shapes for name in shape.columns))

    def __call__(self, record: dict[str, Any]) -> Dialogue:
        """BadRecord for what is none of them."""
        return (self._shape or _shape_of(record)).read(record)


def _shape_of(record: dict[str, Any]) -> Shape:
    for shape in SHAPES.values():
        if all(record.get(name) is not None for name in shape.needs):
            return shape
    known = "; ".join(f"{name}: {' and '.join(s.needs)}" for name, s in SHAPES.items())
    raise BadRecord(
        "unknown shape",
        f"it has the keys {sorted(record)}, which are no shape of a conversation ({known}): give "
        "--chat-user and --chat-assistant",
    )
