"""One renderer from messages to token ids, whoever asks: chat, server and fine-tuning.

Special tokens are ids from the beginning.  Text of a message that looks like one stays text:

    built-in formats      say which piece is a token and which is text
    a model's template    gives one string, so every special token that a message spells is parted by
                          a guard character first; what is found afterwards is the template's own
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.config.errors import ConfigError
from megatron_lite.data.chat.formats import BOS, CHAT_FORMATS, EOS, Message, Special, check_messages
from megatron_lite.data.chat.pieces import Rendered, Rendering, TextGuards
from megatron_lite.data.chat.templates import (
    Sandbox,
    ends_of_generation,
    named_tokens,
    template_file,
    template_of,
)
from megatron_lite.data.tokenizers.base import Tokenizer


@dataclass(frozen=True, slots=True)
class ChatVocabulary:
    """Text and special tokens of a tokenizer as ids."""

    tokenizer: Tokenizer
    special: Mapping[str, int]
    bos: int
    eos: int

    def text(self, text: str) -> list[int]:
        """Ids of a piece of text, without what the tokenizer puts before every text."""
        return self.tokenizer.encode(text)[len(self.tokenizer.encode("")) :] if text else []

    def named(self) -> dict[str, str]:
        """bos_token and eos_token as texts."""
        texts = {number: text for text, number in self.special.items()}
        both = (("bos_token", self.bos), ("eos_token", self.eos))
        return {name: texts[number] for name, number in both if number in texts}

    def jinja(self, template: str) -> str:
        """A template whose bos_token and eos_token are these, whatever lies beside it."""
        for name, text in self.named().items():
            literal = text.replace("\\", r"\\").replace("'", r"\'")
            template = template.replace(name, f"'{literal}'")
        return template

    def token(self, name: Special) -> int:
        """The id of a special token."""
        if name in (BOS, EOS):
            return self.bos if name == BOS else self.eos
        if name.name not in self.special:
            raise ConfigError(
                f"the tokenizer has no special token {name.name}, which this chat template needs: "
                f"choose another --chat-template of {', '.join(CHAT_FORMATS)}, or a file"
            )
        return self.special[name.name]


@dataclass(frozen=True, slots=True)
class Renderer:
    """ids(): a conversation as the model was trained to read it; ends: after these an answer is over.

    name: which template, for people; begins: stands before what it writes, unless that begins so itself.
    """

    name: str
    vocabulary: ChatVocabulary
    ends: frozenset[int]
    template: str | None = None
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sandbox: Sandbox = dataclasses.field(default_factory=Sandbox)
    begins: Sequence[int] = ()

    def as_jinja(self) -> str:
        """The template as a text that writes the same, for what is kept with a model."""
        if self.template is not None:
            return self.template
        return self.vocabulary.jinja(CHAT_FORMATS[self.name].jinja)

    def check(self) -> None:
        """DataError with file and line for a template that is none, before anything is said."""
        if self.template is not None:
            self.sandbox.render(self.template, None, self.name)
            self.sandbox.close()

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Up to where the assistant's next answer begins."""
        check_messages(messages)
        found = self.encode(self.pieces(messages, asks=True))
        begins = list(self.begins)
        return found if found[: len(begins)] == begins else begins + found

    def encode(self, pieces: Sequence[Rendered]) -> list[int]:
        """Ids of what pieces() gives."""
        return [
            token
            for piece in pieces
            for token in (self.vocabulary.text(piece) if isinstance(piece, str) else [piece])
        ]

    def pieces(self, messages: Sequence[Message], *, asks: bool) -> list[Rendered]:
        """Special tokens as ids, and the texts between them, none empty.

        asks: up to where the next answer begins, with what the template puts before it.
        """
        return self.rendering(messages, asks=asks).pieces

    def rendering(self, messages: Sequence[Message], *, asks: bool) -> Rendering:
        """The pieces, and what the template says is the assistant's."""
        if self.template is not None:
            return self._by_template(self.template, messages, asks)
        found = CHAT_FORMATS[self.name].pieces(messages, asks)
        return Rendering(
            [
                piece if isinstance(piece, str) else self.vocabulary.token(piece)
                for piece in _joined(found)
            ]
        )

    def _by_template(self, template: str, messages: Sequence[Message], asks: bool) -> Rendering:
        special = self.vocabulary.special
        guards = TextGuards.beside(template, *(message.content for message in messages))
        guarded = [
            {"role": message.role, "content": guards.around(message.content, special)}
            for message in messages
        ]
        variables = {**self.variables, "messages": guarded, "add_generation_prompt": asks}
        written = self.sandbox.render(template, variables, self.name, (guards.begin, guards.end))
        found = guards.parted(written.text, special, self.name)
        return found if written.has_blocks else Rendering(found.pieces)


def _joined(pieces: Iterator[str | Special]) -> Iterator[str | Special]:
    """Texts that follow one another are one text: a tokenizer may join across them."""
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            yield text
        yield piece
        text = ""
    if text:
        yield text


def renderer_of(
    tokenizer: Tokenizer,
    folder: Path,
    asked: str | None = None,
    *,
    begins: Sequence[int] = (),
    adapter: Path | None = None,
) -> Renderer:
    """The template that is asked for, a name of CHAT_FORMATS or a file; by default the one in the folder.

    Where there is none, ChatML if the tokenizer has its tokens, else plain.  folder: of the tokenizer's
    files; begins: how texts begin for the model, which templates, and what it was taught by, say themselves;
    adapter: of what was taught to it since.
    """
    special = tokenizer.special_ids
    named = named_tokens(folder)
    bos = special.get(named.get("bos_token", ""), special.get("<s>", tokenizer.eod))
    vocabulary = ChatVocabulary(tokenizer, special, bos, tokenizer.eod)
    said = [folder] if adapter is None else [adapter, folder]
    ends = {tokenizer.eod}.union(*(ends_of_generation(one, tokenizer.vocab_size) for one in said))
    kept = next(filter(None, map(template_of, said)), None) if asked is None or begins else None
    found = kept if asked is None else None
    if asked is not None and asked not in CHAT_FORMATS:
        if not Path(asked).is_file():
            raise ConfigError(
                f"--chat-template {asked} is no file, and none of {', '.join(CHAT_FORMATS)}"
            )
        found = template_file(Path(asked)), Path(asked)
    ours = {vocabulary.jinja(form.jinja): name for name, form in CHAT_FORMATS.items()}
    if found is not None and found[0] in ours:  # kept with a model that was trained on it
        asked, found = ours[found[0]], None
    if found is not None:
        template, path = found
        # files that name no token at all (GPT-2's two, a SentencePiece model) are exported with these
        variables = named or vocabulary.named()
        return Renderer(str(path), vocabulary, frozenset(ends), template, variables)
    known = all(token in special for token in CHAT_FORMATS["chatml"].needs)
    name = asked or ("chatml" if known else "plain")
    for token in CHAT_FORMATS[name].needs:
        vocabulary.token(Special(token))  # raises before anything is said
    ends |= {vocabulary.token(token) for token in CHAT_FORMATS[name].ends}
    if kept is not None and ours.get(kept[0]) == name:
        begins = ()
    return Renderer(name, vocabulary, frozenset(ends), begins=begins)
