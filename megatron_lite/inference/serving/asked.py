"""What a request to OpenAI's interface asks for: prompts as ids, settings, and how to answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_lite.data.chat.formats import Message
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.beginning import text_ids
from megatron_lite.inference.sampling import Sampling
from megatron_lite.inference.serving.fields import Fields, RequestRefused, valid_text
from megatron_lite.inference.serving.picking import Settings

STOPS, ALTERNATIVES = 4, 20
SEEDS = 2**63
WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
)
"""Fields that change no answer."""


class ChatTemplate(Protocol):
    """How a conversation is written for a model."""

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer."""
        ...

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Of a conversation up to where the answer begins; DataError for one that cannot be written."""
        ...


@dataclass(frozen=True, slots=True)
class Served:
    """The model as requests see it.  longest: tokens of prompt and answer; answers: of one request."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    ends: frozenset[int]
    chat: ChatTemplate | None
    longest: int
    answers: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that can be served.

    answers: of each prompt.  echo: each prompt's text goes before its answers.
    """

    chat: bool
    prompts: list[list[int]]
    echo: list[str] | None
    max_tokens: list[int]
    settings: Settings
    answers: int
    stops: list[str]
    ends: frozenset[int]
    stream: bool
    usage_in_stream: bool


def completion(given: dict[str, Any], served: Served) -> Asked:
    """Of /v1/completions; raises RequestRefused."""
    fields = Fields(given)
    _check_model(fields, served)
    prompts, texts = _prompts(fields.take("prompt", ""), served)
    limit = fields.whole("max_tokens", 16, low=1, high=served.longest)
    top = fields.whole("logprobs", None, low=0, high=ALTERNATIVES)
    echo = fields.flag("echo")
    if echo and top is not None:
        raise RequestRefused(
            400, "echo with logprobs is not served: a prompt is not scored", param="echo"
        )
    fields.only("suffix", [""])
    fields.only("best_of", [1, given.get("n")])
    return _asked(fields, served, prompts, limit, top, chat=False, echo=texts if echo else None)


def conversation(given: dict[str, Any], served: Served) -> Asked:
    """Of /v1/chat/completions; raises RequestRefused."""
    fields = Fields(given)
    _check_model(fields, served)
    if served.chat is None:
        raise RequestRefused(
            400, f"{served.name} has no chat template: ask /v1/completions, or serve it with "
            "--chat-template",
        )  # fmt: skip
    prompt = served.chat.ids(_messages(fields.take("messages")))
    limit = fields.whole("max_tokens", None, low=1, high=served.longest)
    limit = fields.whole("max_completion_tokens", limit, low=1, high=served.longest)
    alternatives = fields.whole("top_logprobs", None, low=0, high=ALTERNATIVES)
    told = fields.flag("logprobs")
    if alternatives is not None and not told:
        raise RequestRefused(400, "top_logprobs needs logprobs true", param="top_logprobs")
    for name, allowed in (
        ("response_format", [{"type": "text"}]), ("tools", [[]]), ("tool_choice", ["none", "auto"]),
        ("modalities", [["text"]]), ("functions", [[]]), ("parallel_tool_calls", [True, False]),
    ):  # fmt: skip
        fields.only(name, allowed)
    top = (alternatives or 0) if told else None
    return _asked(fields, served, [prompt], limit, top, chat=True, echo=None)


def _asked(
    fields: Fields, served: Served, prompts: list[list[int]], limit: int | None, top: int | None,
    *, chat: bool, echo: list[str] | None,
) -> Asked:  # fmt: skip
    """The fields that both have in common."""
    count = fields.whole("n", 1, low=1, high=served.answers)
    assert count is not None
    if count * len(prompts) > served.answers:
        raise RequestRefused(
            400, f"{len(prompts)} prompts with n {count} are {count * len(prompts)} answers: "
            f"at most {served.answers} of one request", param="n",
        )  # fmt: skip
    settings = _settings(fields, served, top)
    stream = fields.flag("stream")
    options = Fields(_object(fields.take("stream_options", {}), "stream_options"))
    usage = options.flag("include_usage")
    options.ignore("include_obfuscation")
    options.end()
    stops = fields.texts("stop", most=STOPS)
    fields.ignore(*WITHOUT_EFFECT)
    fields.end()
    ends = served.ends | served.chat.ends if chat and served.chat else served.ends
    return Asked(
        chat=chat, prompts=prompts, echo=echo,
        max_tokens=[_fitting(len(ids), limit, served) for ids in prompts],
        settings=settings, answers=count, stops=stops, ends=ends, stream=stream, usage_in_stream=usage,
    )  # fmt: skip


def _settings(fields: Fields, served: Served, top: int | None) -> Settings:
    top_k = fields.whole("top_k", 0, low=-1, high=2**31)
    seed = fields.whole("seed", None, low=-SEEDS, high=SEEDS - 1)
    assert top_k is not None
    return Settings(
        Sampling(
            temperature=fields.number("temperature", 1.0, low=0.0, high=2.0),
            top_p=fields.number("top_p", 1.0, low=1e-6, high=1.0),
            top_k=max(top_k, 0),
            min_p=fields.number("min_p", 0.0, low=0.0, high=1.0),
            repetition_penalty=fields.number("repetition_penalty", 1.0, low=0.01, high=100.0),
        ),
        presence_penalty=fields.number("presence_penalty", 0.0, low=-2.0, high=2.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, low=-2.0, high=2.0),
        bias=_bias(fields.take("logit_bias", {}), served),
        seed=random.SystemRandom().randrange(SEEDS) if seed is None else seed % SEEDS,
        top=top,
    )


def _fitting(prompt: int, limit: int | None, served: Served) -> int:
    """Tokens that the answer may have; without a limit all that there is room for."""
    room = served.longest - prompt
    if room < (limit or 1):
        raise RequestRefused(
            400, f"the prompt is {prompt} tokens and max_tokens {limit or 1}: together at most "
            f"{served.longest}", param="max_tokens", code="context_length_exceeded",
        )  # fmt: skip
    return limit or room


def _check_model(fields: Fields, served: Served) -> None:
    name = fields.take("model", served.name)
    if name != served.name:
        raise RequestRefused(
            404, f"model {name!r:.60} is not served here: {served.name} is", param="model",
            code="model_not_found",
        )  # fmt: skip


def _prompts(given: Any, served: Served) -> tuple[list[list[int]], list[str]]:
    """Ids and texts of a prompt or several, each a text or ids."""
    one = isinstance(given, str) or (
        isinstance(given, list) and given and all(type(i) is int for i in given)
    )
    several = [given] if one else given
    if not isinstance(several, list) or not several:
        raise RequestRefused(400, "prompt must be a text, ids, or a list of these", param="prompt")
    if len(several) > served.answers:
        raise RequestRefused(
            400, f"{len(several)} prompts: at most {served.answers} answers of one request",
            param="prompt",
        )  # fmt: skip
    tokenizer, found, texts = served.tokenizer, [], []
    for prompt in several:
        if isinstance(prompt, str):
            ids, text = text_ids(tokenizer, valid_text(prompt, "prompt")), prompt
        else:
            ids = _ids(prompt, served) or text_ids(tokenizer, "")
            text = tokenizer.decode(prompt)
        found.append(ids)
        texts.append(text)
    return found, texts


def _ids(prompt: Any, served: Served) -> list[int]:
    if not (isinstance(prompt, list) and all(type(i) is int for i in prompt)):
        raise RequestRefused(400, "prompt must be a text, ids, or a list of these", param="prompt")
    wrong = [i for i in prompt if not 0 <= i < served.vocab_size]
    if wrong:
        raise RequestRefused(400, f"prompt: ids are 0 to {served.vocab_size - 1}", param="prompt")
    return prompt


def _messages(given: Any) -> list[Message]:
    if not isinstance(given, list) or not given:
        raise RequestRefused(
            400, "messages must be a list of at least one message", param="messages"
        )
    found = []
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        fields = Fields(_object(message, where))
        role = valid_text(fields.take("role"), f"{where}.role")
        content = fields.take("content")
        if isinstance(content, list):
            content = "".join(_part(part, f"{where}.content") for part in content)
        fields.ignore("name", "refusal")
        fields.end()
        found.append(Message(role, valid_text(content, f"{where}.content")))
    return found


def _part(given: Any, where: str) -> str:
    part = _object(given, where)
    if part.get("type") != "text":
        raise RequestRefused(400, f"{where}: only parts of type text are served", param=where)
    return valid_text(part.get("text"), f"{where}.text")


def _object(given: Any, name: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise RequestRefused(400, f"{name} must be a JSON object", param=name)
    return given


def _bias(given: Any, served: Served) -> dict[int, float]:
    found = {}
    for name, value in _object(given, "logit_bias").items():
        whole = name.isascii() and name.isdigit() and len(name) < 10
        if not whole or int(name) >= served.vocab_size:
            raise RequestRefused(
                400, f"logit_bias {name!r:.40}: ids are 0 to {served.vocab_size - 1}",
                param="logit_bias",
            )  # fmt: skip
        found[int(name)] = Fields({name: value}).number(name, 0.0, low=-100.0, high=100.0)
    return found
