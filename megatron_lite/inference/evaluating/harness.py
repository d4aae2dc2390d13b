"""Tasks of lm-eval-harness, answered by our scorer and our generation (extra `eval`).

The library asks for log probabilities of token lists, of whole texts, and for continuations; how tasks are
written, shown and judged is its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.extras import how_to_install
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.inference.evaluating.corpora import end_of
from megatron_lite.inference.evaluating.examinee import Examinee
from megatron_lite.inference.evaluating.problems import continue_greedily
from megatron_lite.inference.evaluating.results import Result
from megatron_lite.inference.evaluating.scorer import ScoredRow


def _library() -> Any:
    """lm_eval, which must not go online; ConfigError where it is not installed."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    try:
        import lm_eval.api.model  # noqa: PLC0415  an optional extra
        import lm_eval.tasks  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"--lm-eval needs lm-eval-harness ({error}): {how_to_install('eval')}"
        ) from None
    return lm_eval


def scored_row(context: Sequence[int], continuation: Sequence[int], positions: int) -> ScoredRow:
    """A continuation behind a context that is cut at its beginning where both are too long."""
    tokens = np.array([*context, *continuation][-(positions + 1) :], np.int64)
    count = min(len(continuation), len(tokens) - 1)
    at = np.arange(len(tokens) - 1 - count, len(tokens) - 1)
    return ScoredRow(tokens[:-1], at, tokens[at + 1])


def harness_model(examinee: Examinee) -> Any:
    """The examinee as one of the library's models."""
    library = _library()
    positions = examinee.model.context.model.num_positions
    tokenizer, scorer = examinee.tokenizer, examinee.scorer

    class HarnessModel(library.api.model.TemplateLM):  # type: ignore[misc, name-defined]
        """What the library calls; every rank calls it alike."""

        @property
        def eot_token_id(self) -> int:
            """It stands before a text that nothing stands before."""
            end = end_of(tokenizer)
            if end is None:
                raise DataError("--lm-eval: the model's tokenizer has no token that ends documents")
            return end

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            """Ids of a text; what looks like a special token stays text."""
            return tokenizer.encode(string)

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
        ) -> list[tuple[float, bool]]:
            rows = [scored_row(ctx, continuation, positions) for _, ctx, continuation in requests]
            with examinee.progress("lm-eval", len(rows), "rows") as told:
                found = scorer.all(rows, told)
            return [(float(s.log_probabilities.sum()), bool(s.likeliest.all())) for s in found]

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            """Of whole texts, in windows that do not overlap."""
            windows, counts = [], []
            for request in requests:
                ids = [self.eot_token_id, *tokenizer.encode(request.args[0])]
                parts = list(rolling_windows(ids, positions))
                windows += parts
                counts.append(len(parts))
            scores = iter(scorer.all(windows))
            return [
                float(sum(next(scores).log_probabilities.sum() for _ in range(count)))
                for count in counts
            ]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """Greedy continuations; ConfigError for a task that wants them drawn."""
            prompts, stops, lengths = [], [], []
            for request in requests:
                context, asked = request.args
                if asked.get("do_sample") and asked.get("temperature", 0.0) > 0.0:
                    raise ConfigError(
                        f"--lm-eval: {request.task_name} draws tokens; only greedy ones are generated"
                    )
                length = min(int(asked.get("max_gen_toks", 256)), positions - 1)
                until = asked.get("until") or []
                prompts.append(
                    (tokenizer.encode(context) or [self.eot_token_id])[-(positions - length) :]
                )
                stops.append([until] if isinstance(until, str) else list(until))
                lengths.append(length)
            with examinee.progress("lm-eval", len(prompts), "texts") as told:
                return continue_greedily(
                    examinee, prompts, max_new_tokens=lengths, stops=stops, told=told
                )

    return HarnessModel()


def rolling_windows(ids: Sequence[int], positions: int) -> list[ScoredRow]:
    """ids: behind the token that begins a text.  Each is scored once, and the last window is a whole one
    where there are so many: it scores what is left behind what it sees again."""
    rows, done = [], 1
    while done < len(ids):
        end = min(done + positions, len(ids))
        begin = max(0, end - 1 - positions)
        rows.append(scored_row(ids[begin:done], ids[done:end], positions))
        done = end
    return rows


@dataclass(slots=True)
class HarnessTasks:
    """The exam of some tasks; folder: where their YAML files lie, beside the library's own."""

    tasks: Sequence[str]
    folder: str | None = None
    shots: int | None = None
    limit: int | None = None

    def look(self, model: ModelConfig, tokenizer: Tokenizer) -> Sequence[str]:
        """The library is there, and knows the tasks."""
        manager = self._manager(_library())
        unknown = [name for name in self.tasks if name not in manager.all_tasks]
        if unknown:
            where = f" and --include-path {self.folder}" if self.folder else ""
            raise ConfigError(f"--lm-eval {', '.join(unknown)}: no task of lm-eval-harness{where}")
        return []

    def _manager(self, library: Any) -> Any:
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ConfigError(f"--include-path {self.folder} is no folder")
        return library.tasks.TaskManager(include_path=self.folder)

    def run(self, examinee: Examinee) -> Result:
        """Collective over the model's ranks: each asks the same, and the scorer shares it."""
        library = _library()
        found = library.simple_evaluate(
            model=harness_model(examinee), tasks=list(self.tasks), num_fewshot=self.shots,
            limit=self.limit, task_manager=self._manager(library), log_samples=False,
            bootstrap_iters=0,
        )  # fmt: skip
        results = {
            task: {name: value for name, value in values.items() if isinstance(value, int | float)}
            for task, values in found["results"].items()
        }
        rows = [["lm-eval", "metric", "value"]]
        rows += [
            [task, name.removesuffix(",none"), f"{value:.4f}"]
            for task, values in results.items()
            for name, value in values.items()
            if "stderr" not in name and name != "sample_len"
        ]
        values = {"tasks": results, "versions": dict(found.get("versions", {}))}
        return Result("lm-eval", ", ".join(self.tasks), rows, values)
