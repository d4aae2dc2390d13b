"""Answers as OpenAI's interface writes them: whole, or in chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_lite.inference.serving.asked import Asked, Served
from megatron_lite.inference.serving.fields import RequestRefused
from megatron_lite.inference.serving.model_thread import AnswerToken, Ending
from megatron_lite.inference.texts import TextStream

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class AnswerChoice:
    """One answer as far as it has come."""

    stream: TextStream
    tokens: int = 0
    told: list[AnswerToken] = field(default_factory=list)  # those with a chance
    finish: str | None = None

    def take(self, event: AnswerToken | Ending) -> str:
        """The new text that is certain; sets `finish` at the end.  Raises where the model failed."""
        if isinstance(event, Ending):
            if event.why == "failed":
                raise RequestRefused(
                    500, "the model failed while it answered; it begins again: ask again"
                )
            if event.why == "down":
                raise RequestRefused(503, "the model is not served any more")
            new = self.stream.finish()
            self.finish = "stop" if self.stream.found else event.why
        else:
            self.tokens += 1
            if event.chance is not None:
                self.told.append(event)
            new = self.stream.add(event.id)
            if self.stream.found:
                self.finish = "stop"
        return new


class Answer:
    """All choices of a request, and how they are written."""

    def __init__(self, asked: Asked, served: Served) -> None:
        self._asked, self._decode = asked, served.tokenizer.decode
        self.choices = [
            AnswerChoice(TextStream(served.tokenizer, ids, asked.stops))
            for ids in asked.prompts
            for _ in range(asked.answers)
        ]
        kind = "chat.completion" if asked.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind + (".chunk" if asked.chat and asked.stream else ""),
            "created": int(time.time()),
            "model": served.name,
        }

    def prompt_of(self, index: int) -> int:
        """Which prompt a choice answers."""
        return index // self._asked.answers

    @property
    def is_whole(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish is not None for choice in self.choices)

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for index, choice in enumerate(self.choices):
            lead = self._lead(index)
            said: dict[str, Any] = {"text": lead + choice.stream.text}
            if self._asked.chat:
                said = {
                    "message": {"role": "assistant", "content": choice.stream.text, "refusal": None}
                }
            logprobs = self._logprobs(choice.told, len(lead))
            choices.append(
                {"index": index, **said, "logprobs": logprobs, "finish_reason": choice.finish}
            )
        return {**self._head, "choices": choices, "usage": self._usage()}

    def first_chunks(self) -> list[bytes]:
        """What a stream begins with."""
        if self._asked.chat:
            begin = {"role": "assistant", "content": ""}
            return [self._chunk(i, {"delta": begin}) for i in range(len(self.choices))]
        leads = [(i, self._lead(i)) for i in range(len(self.choices))]
        return [self._chunk(i, {"text": lead}) for i, lead in leads if lead]

    def next_chunk(self, index: int, new: str) -> bytes | None:
        """Of new text, its tokens' chances, or an end; None where there is nothing to say."""
        choice = self.choices[index]
        if not (new or choice.told or choice.finish):
            return None
        said: dict[str, Any] = {"text": new}
        if self._asked.chat:
            said = {"delta": {"content": new} if new else {}}
        before = len(self._lead(index)) + len(choice.stream.text) - len(new)
        logprobs = self._logprobs(choice.told, before)
        choice.told = []
        return self._chunk(index, said, logprobs, choice.finish)

    def last_chunks(self) -> list[bytes]:
        """What a stream ends with."""
        usage = {**self._head, "choices": [], "usage": self._usage()}
        return [*([event(usage)] if self._asked.usage_in_stream else []), DONE]

    def _chunk(
        self, index: int, said: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> bytes:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._asked.usage_in_stream:
            chunk["usage"] = None
        return event(chunk)

    def _lead(self, index: int) -> str:
        return "" if self._asked.echo is None else self._asked.echo[self.prompt_of(index)]

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(ids) for ids in self._asked.prompts)
        new = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _logprobs(self, told: Sequence[AnswerToken], offset: int) -> dict[str, Any] | None:
        if self._asked.settings.top is None:
            return None
        if self._asked.chat:
            return {"content": [self._told_in_chat(piece) for piece in told], "refusal": None}
        texts = [self._decode([piece.id]) for piece in told]
        chances = [piece.chance for piece in told if piece.chance is not None]
        lengths = [len(text) for text in texts]
        return {
            "tokens": texts,
            "token_logprobs": [chance.logprob for chance in chances],
            "top_logprobs": [
                # of several with one text, parts of characters, the likeliest is told
                {self._decode([other]): logprob for other, logprob in reversed(chance.top)}
                for chance in chances
            ],
            "text_offset": [offset + sum(lengths[:n]) for n in range(len(texts))],
        }

    def _told_in_chat(self, piece: AnswerToken) -> dict[str, Any]:
        assert piece.chance is not None
        others = [self._told(other, logprob) for other, logprob in piece.chance.top]
        return {**self._told(piece.id, piece.chance.logprob), "top_logprobs": others}

    def _told(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._decode([token])
        known = None if "\ufffd" in text else list(text.encode("utf-8"))
        return {"token": text, "logprob": logprob, "bytes": known}


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
