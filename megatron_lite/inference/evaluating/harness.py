"""Tasks of lm-eval-harness, answered by our scorer and our generation (extra `eval`).

How tasks are written, asked and judged is the library's own; it asks a model for

    loglikelihood           of continuations behind contexts, and whether they are the likeliest
    loglikelihood_rolling   of whole texts
    generate_until          continuations up to a stop text
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from megatron_lite.config.errors import ConfigError, DataError, MegatronLiteError
from megatron_lite.config.extras import how_to_install
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.inference.evaluating.corpora import end_of
from megatron_lite.inference.evaluating.examinee import Examinee
from megatron_lite.inference.evaluating.harness_model import NewTokens, harness_model, new_tokens
from megatron_lite.inference.evaluating.harness_tasks import AskedTasks
from megatron_lite.inference.evaluating.results import Result

_SEED = 1234
"""Of the few-shot examples that a task draws: the library's default."""
_RESAMPLES = 1000
"""For the standard errors that have no formula."""


def harness() -> ModuleType:
    """lm_eval, which stays offline and renders in a sandbox; ConfigError where it is not installed."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DISABLE_MULTIPROC"):
        os.environ[name] = "1"
    try:
        import lm_eval.api.model  # noqa: PLC0415  an optional extra
        import lm_eval.evaluator  # noqa: PLC0415
        import lm_eval.tasks  # noqa: PLC0415
        from jinja2.sandbox import SandboxedEnvironment  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"--lm-eval needs lm-eval-harness, the extra megatron_lite[eval] ({error}): "
            f"{how_to_install('eval')}"
        ) from None
    theirs = lm_eval.utils.env
    if not isinstance(theirs, SandboxedEnvironment):  # a template could reach all of Python
        ours = SandboxedEnvironment(
            undefined=theirs.undefined, keep_trailing_newline=theirs.keep_trailing_newline
        )
        ours.filters.update(theirs.filters)
        lm_eval.utils.env = ours
    return lm_eval


@dataclass(slots=True)
class HarnessTasks:
    """The exam of some tasks; folder: where more of them lie, as YAML files, beside the library's own.

    shots: examples before each question, where a task does not forbid them; its own number by default.
    """

    tasks: Sequence[str]
    folder: str | None = None
    shots: int | None = None
    limit: int | None = None
    _library: ModuleType = field(init=False)
    _loaded: dict[str, Any] = field(init=False)

    def look(self, model: ModelConfig, tokenizer: Tokenizer) -> Sequence[str]:
        """The library is there and knows the tasks, whose data are read, and the model can do them."""
        if end_of(tokenizer) is None:
            raise DataError(
                "--lm-eval: the model's tokenizer has no token that ends documents, and one must stand "
                "before a text that nothing stands before: give another --vocab-file"
            )
        self._library = harness()
        self._loaded = AskedTasks(self._library, self.tasks, self.folder).load()
        for name, task in self._loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(
                    f"--lm-eval {name} runs programs that the model writes: leave it out"
                )
            if getattr(task, "MULTIMODAL", False):
                raise ConfigError(f"--lm-eval {name} asks about more than text: leave it out")
            if task.get_config("output_type") == "generate_until":
                asked = new_tokens(name, task.get_config("generation_kwargs") or {})
                _require_room(name, asked, model.num_positions)
            self._choose_shots(task)
        return []

    def _choose_shots(self, task: Any) -> None:
        """As the library does for its --num_fewshot."""
        own = task.get_config("num_fewshot")
        if self.shots is not None and own != 0:
            task.set_config(key="num_fewshot", value=self.shots)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)

    def run(self, examinee: Examinee) -> Result:
        """Collective over the model's ranks: each asks the same, and the scorer shares it."""
        random.seed(0)
        np.random.seed(_SEED)
        asked = harness_model(self._library, examinee)
        try:
            found = self._library.evaluator.evaluate(
                lm=asked, task_dict=self._loaded, limit=self.limit, log_samples=False,
                bootstrap_iters=_RESAMPLES,
            )  # fmt: skip
        except MegatronLiteError:
            raise
        except (LookupError, TypeError, ValueError, SyntaxError, self._template_error()) as error:
            raise DataError(
                f"--lm-eval {', '.join(self.tasks)}: a task does not fit its data "
                f"({type(error).__name__}: {error}) - mend its YAML file, or try it in lm-eval-harness itself"
            ) from error
        return _result(
            self.tasks, found, asked.shortened, examinee.model.context.model.num_positions
        )

    def _template_error(self) -> type[Exception]:
        import jinja2  # noqa: PLC0415  the library needs it

        return jinja2.TemplateError


def _require_room(name: str, asked: NewTokens, positions: int) -> None:
    if asked.longest >= positions:
        raise ConfigError(
            f"--lm-eval {name} generates up to {asked.longest} tokens, which leaves no room for a prompt in "
            f"the model's {positions} positions: leave it out, or give a copy of its YAML file a smaller "
            "max_gen_toks"
        )


def _result(
    tasks: Sequence[str], found: Mapping[str, Any], shortened: int, positions: int
) -> Result:
    numbers = {
        task: {name: value for name, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }
    shots = found.get("n-shot", {})
    rows = [["lm-eval-harness", "shots", "metric", "value", "stderr"]]
    for task, found_of in numbers.items():
        for name, value in found_of.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            error = found_of.get(f"{metric}_stderr,{kind}")
            rows.append([
                task, str(shots.get(task, "-")), metric if kind == "none" else f"{metric} ({kind})",
                f"{value:.4f}", "-" if error is None else f"{error:.4f}",
            ])  # fmt: skip
    values = {"tasks": numbers, "shots": shots, "shortened": shortened,
              "versions": found.get("versions", {}), "samples": found.get("n-samples", {})}  # fmt: skip
    notes = []
    if shortened:
        notes.append(
            f"{shortened} prompts have lost their beginning, for the model's {positions} positions"
        )
    return Result("lm-eval", ", ".join(tasks), rows, values, notes)
