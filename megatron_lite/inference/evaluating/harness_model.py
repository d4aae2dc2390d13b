"""The model under test as lm-eval-harness asks it: one class of the library's, over our scorer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from megatron_lite.config.errors import ConfigError
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.inference.evaluating.corpora import end_of
from megatron_lite.inference.evaluating.examinee import Examinee
from megatron_lite.inference.evaluating.problems import continue_greedily
from megatron_lite.inference.evaluating.scorer import ScoredRow

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_LONGEST = 256  # where a task says none of them


class NewTokens(NamedTuple):
    """How a continuation ends: after so many tokens, or before one of these texts."""

    longest: int
    stops: Sequence[str]


def new_tokens(task: str, asked: Mapping[str, Any]) -> NewTokens:
    """Of a task's generation_kwargs; ConfigError where it wants tokens drawn."""
    sampled = asked.get("do_sample")
    if float(asked.get("temperature") or 0.0) > 0.0 and sampled is not False or sampled is True:
        raise ConfigError(
            f"--lm-eval {task} draws its tokens (do_sample, temperature): only greedy ones are generated"
        )
    given = [asked[name] for name in _LENGTHS if asked.get(name) is not None]
    stops = asked.get("until") or []
    return NewTokens(
        int(given[0]) if given else _LONGEST, [stops] if isinstance(stops, str) else list(stops)
    )


def scored_row(context: Sequence[int], continuation: Sequence[int], positions: int) -> ScoredRow:
    """A continuation behind a context that is cut at its beginning where both are too long."""
    tokens = np.array([*context, *continuation][-(positions + 1) :], np.int64)
    count = min(len(continuation), len(tokens) - 1)
    at = np.arange(len(tokens) - 1 - count, len(tokens) - 1)
    return ScoredRow(tokens[:-1], at, tokens[at + 1])


def rolling_rows(first: int, ids: Sequence[int], positions: int) -> Iterator[ScoredRow]:
    """A text behind the token that begins one.  Each token is scored once, and the last window is a whole
    one where there are so many: it scores what is left behind what it sees again."""
    whole, done = [first, *ids], 1
    while done < len(whole):
        end = min(done + positions, len(whole))
        begin = max(0, end - 1 - positions)
        yield scored_row(whole[begin:done], whole[done:end], positions)
        done = end


def harness_model(library: ModuleType, examinee: Examinee) -> Any:
    """The examinee as one of the library's models; every rank calls it alike."""
    base: Any = library.api.model.TemplateLM
    positions = examinee.model.context.model.num_positions
    tokenizer, scorer = examinee.tokenizer, examinee.scorer
    begins = begins_of(tokenizer)

    class HarnessModel(base):  # type: ignore[misc]
        """shortened: prompts that had no room."""

        shortened = 0

        @property
        def eot_token_id(self) -> int:
            """It ends a text."""
            end = end_of(tokenizer)
            assert end is not None, "HarnessTasks.look() has asked"
            return end

        @property
        def prefix_token_id(self) -> int:
            """It stands before a text that nothing stands before."""
            return begins[-1] if begins else self.eot_token_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            """Ids of a text; what looks like a special token stays text."""
            ids = tokenizer.encode(string)[len(tokenizer.encode("")) :]
            return ids if add_special_tokens is False else [*begins, *ids]

        def loglikelihood(
            self, requests: Sequence[Any], disable_tqdm: bool = True
        ) -> list[tuple[float, bool]]:
            """As the library encodes them; the bar is ours."""
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return found

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], **_: Any
        ) -> list[tuple[float, bool]]:
            rows = [scored_row(context, more, positions) for _, context, more in requests]
            self.shortened += sum(len(c) + len(m) > positions + 1 for _, c, m in requests)
            with examinee.progress("lm-eval", len(rows), "rows") as told:
                found = scorer.all(rows, told)
            return [(float(s.log_probabilities.sum()), bool(s.likeliest.all())) for s in found]

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = True
        ) -> list[float]:
            """Of whole texts, in windows that do not overlap."""
            texts = [self.tok_encode(request.args[0]) for request in requests]
            windows = [list(rolling_rows(self.prefix_token_id, ids, positions)) for ids in texts]
            rows = [row for one in windows for row in one]
            with examinee.progress("lm-eval", len(rows), "rows") as told:
                scores = iter(scorer.all(rows, told))
            return [
                float(sum(next(scores).log_probabilities.sum() for _ in one)) for one in windows
            ]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
            """Greedy continuations."""
            prompts, ends = [], []
            for request in requests:
                text, asked = request.args
                ends.append(new_tokens(request.task_name, asked))
                room = positions - ends[-1].longest
                prompts.append((self.tok_encode(text) or [self.prefix_token_id])[-room:])
                self.shortened += len(self.tok_encode(text)) > room
            with examinee.progress("lm-eval", len(prompts), "texts") as told:
                return continue_greedily(
                    examinee, prompts, max_new_tokens=[end.longest for end in ends],
                    stops=[end.stops for end in ends], told=told,
                )  # fmt: skip

    return HarnessModel()


def begins_of(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer's own library puts before every text."""
    return [*tokenizer.begins, *tokenizer.encode("")]
