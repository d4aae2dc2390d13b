"""Word problems in GSM8K's files: a solution is generated, and its last number is compared.

{"question": "Natalia sold ...", "answer": "Natalia sold 48/2 = <<48/2=24>>24 ...\\n#### 72"}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import torch

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.beginning import text_ids
from megatron_lite.inference.evaluating.corpora import end_of, read_text
from megatron_lite.inference.evaluating.examinee import Examinee
from megatron_lite.inference.evaluating.results import Result
from megatron_lite.inference.generate import Generation, TextRequest
from megatron_lite.inference.sampling import Sampler, Sampling
from megatron_lite.inference.texts import TextStream
from megatron_lite.parallel.collectives import all_reduce

# a minus behind a digit or a bracket takes away
_NUMBER = r"(?:(?<![\w.)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


def marked_answer(text: str) -> Decimal | None:
    """The number behind the first ####."""
    found = _MARKED.search(text)
    return None if found is None else _value(found[1])


def last_number(text: str) -> Decimal | None:
    """The number behind ####, else the last one that stands there at all."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    found = _ANY.findall(text)
    return _value(found[-1]) if found else None


def _value(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", ""))


@dataclass(frozen=True, slots=True)
class Problem:
    """solution: with its reasoning; answer: its number."""

    question: str
    solution: str
    answer: Decimal

    def asked(self) -> str:
        """Up to where a solution belongs."""
        return f"Question: {self.question}\nAnswer:"


STOP = "Question:"
"""What begins the next problem; a solution ends before it."""


def read_problems(path: str, flag: str) -> list[Problem]:
    """All problems of a file of JSON lines; DataError names the line of anything else."""
    found = []
    for number, line in enumerate(read_text(path, flag).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{flag} {path}:{number} is no JSON ({error})") from None
        texts = [values.get(key) if isinstance(values, dict) else None
                 for key in ("question", "answer")]  # fmt: skip
        question, solution = texts
        if not isinstance(question, str) or not isinstance(solution, str):
            raise DataError(
                f'{flag} {path}:{number} is not {{"question": text, "answer": text}}, as GSM8K\'s lines are'
            )
        try:
            (question + solution).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{flag} {path}:{number} has half a surrogate pair ({error.object[error.start]!r}), which is "
                "no character: mend the line"
            ) from None
        answer = marked_answer(solution)
        if answer is None:
            raise DataError(f"{flag} {path}:{number}: no number stands behind #### in its answer")
        found.append(Problem(question.strip(), solution.strip(), answer))
    if not found:
        raise DataError(f"{flag} {path} holds no problem - give a file of GSM8K's form")
    return found


def problem_prompt(examples: Sequence[Problem], problem: Problem) -> str:
    """The examples with their solutions, then the problem."""
    shown = [f"{one.asked()} {one.solution}\n\n" for one in examples]
    return "".join(shown) + problem.asked()


def continue_greedily(
    examinee: Examinee,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: Sequence[int],
    stops: Sequence[Sequence[str]],
    told: Callable[[int], object] = lambda done: None,
) -> list[str]:
    """What the model says behind each prompt, up to a stop, an end of document or so many tokens; special
    tokens are no text.

    Collective over the model's ranks; dp ranks share the prompts, and all get all texts.
    """
    ctx, tokenizer = examinee.model.context.ctx, examinee.tokenizer
    end = end_of(tokenizer)
    ends = frozenset(() if end is None else (end,))
    greedy = Sampler(Sampling(temperature=0.0), tokenizer.vocab_size)
    mine = range(ctx.dp.rank, len(prompts), ctx.dp.size)
    requests = [
        TextRequest(
            prompts[n], max_new_tokens[n], greedy, ends,
            _until(TextStream(tokenizer, prompts[n], stops[n])),
        )
        for n in mine
    ]  # fmt: skip
    longest = max(max_new_tokens, default=1)
    found = torch.zeros(len(prompts), longest + 1, dtype=torch.int64)  # ids, one more than they are
    counts = [0] * len(requests)
    for token in Generation(examinee.model, rows=examinee.scorer.batch_size).run(requests):
        if token.id is not None:
            found[mine[token.request], counts[token.request]] = token.id + 1
            counts[token.request] += 1
        if token.end is not None:
            told(ctx.dp.size)
    found = all_reduce(found.to(ctx.device), ctx.dp).cpu()  # waits for the device
    texts, special = [], {0, *(number + 1 for number in tokenizer.special_ids.values())}
    for row, until in zip(found.tolist(), stops, strict=True):
        text = tokenizer.decode([number - 1 for number in row if number not in special])
        places = [text.find(stop) for stop in until if stop in text]
        texts.append(text[: min(places)] if places else text)
    return texts


def _until(stream: TextStream) -> Callable[[Sequence[int]], bool]:
    """Whether one of its stop texts has come."""

    def stands(generated: Sequence[int]) -> bool:
        stream.add(generated[-1])
        return stream.found

    return stands


@dataclass(slots=True)
class WordProblems:
    """The exam of one file; examples: a file of the same form, whose first `shots` are shown."""

    path: str
    examples: str | None = None
    shots: int = 5
    limit: int | None = None
    max_new_tokens: int = 256
    _problems: list[Problem] = field(init=False)
    _prompts: list[list[int]] = field(init=False)
    _shortened: int = 0

    def look(self, model: ModelConfig, tokenizer: Tokenizer) -> Sequence[str]:
        """Both files are read, and all prompts made: whole examples, as many as find room."""
        self._problems = read_problems(self.path, "--gsm8k")[: self.limit]
        examples: list[Problem] = []
        if self.examples is not None:
            examples = read_problems(self.examples, "--gsm8k-examples")
            if len(examples) < self.shots:
                raise DataError(
                    f"--gsm8k-examples {self.examples} has {len(examples)} problems, --shots wants "
                    f"{self.shots}: give less"
                )
        room = model.num_positions - self.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"--max-new-tokens {self.max_new_tokens} leaves no room for a problem in the model's "
                f"{model.num_positions} positions: give less"
            )
        self._prompts = []
        for problem in self._problems:
            shots = min(self.shots, len(examples))
            ids = text_ids(tokenizer, problem_prompt(examples[:shots], problem))
            while len(ids) > room and shots:
                shots -= 1
                ids = text_ids(tokenizer, problem_prompt(examples[:shots], problem))
            self._shortened += shots < min(self.shots, len(examples)) or len(ids) > room
            self._prompts.append(ids[-room:])
        if not self._shortened:
            return []
        return [f"{self.path}: {self._shortened} of {len(self._prompts)} prompts have less than they "
                f"should, for {room} positions beside --max-new-tokens {self.max_new_tokens}"]  # fmt: skip

    def run(self, examinee: Examinee) -> Result:
        """Collective over the model's ranks."""
        count = len(self._problems)
        with examinee.progress("GSM8K", count, "problems") as told:
            texts = continue_greedily(
                examinee, self._prompts, max_new_tokens=[self.max_new_tokens] * count,
                stops=[[STOP]] * count, told=told,
            )  # fmt: skip
        answers = [problem.answer for problem in self._problems]
        marked = sum(marked_answer(t) == a for t, a in zip(texts, answers, strict=True))
        any_number = sum(last_number(t) == a for t, a in zip(texts, answers, strict=True))
        values: dict[str, Any] = {
            "problems": count,
            "shots": self.shots if self.examples else 0,
            "shortened": self._shortened,
            "exact_match": marked / count,
            "last_number": any_number / count,
            "solutions": texts,
        }
        rows = [
            [f"GSM8K, {values['shots']} shots", "problems", "exact match", "last number"],
            [self.path, str(count), f"{marked / count:.4f}", f"{any_number / count:.4f}"],
        ]
        return Result("GSM8K", self.path, rows, values)
