"""lm-eval-harness's tasks, as far as the library need not be there: files, windows, lengths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.config.errors import ConfigError
from megatron_lite.inference.evaluating.harness_model import (
    new_tokens,
    rolling_rows,
    scored_row,
)
from megatron_lite.inference.evaluating.harness_tasks import objections

PLAIN = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: docs.jsonl}}
doc_to_text: "{{question}}"
metric_list: [{metric: acc, aggregation: mean}]
"""


def said_of(tmp_path: Path, more: str) -> list[str]:
    (tmp_path / "lm_eval" / "tasks").mkdir(parents=True, exist_ok=True)
    (tmp_path / "lm_eval" / "tasks" / "own.yaml").write_text("process_docs: !function utils.f\n")
    (tmp_path / "part.yaml").write_text("a: 1\nfewshot_config: {samples: !function utils.f}\n")
    (tmp_path / "mine.yaml").write_text(PLAIN + more)
    return list(objections(tmp_path / "mine.yaml", tmp_path / "lm_eval", ["acc", "exact_match"]))


@pytest.mark.parametrize(
    "more",
    ["", "include: lm_eval/tasks/own.yaml", "a: &a [&b {x: 1}]\nb: [*a, *b]", "include: mine.yaml",
     "tag: [a]\nc: !!str 3", "dataset_name: {dataset_path: owner/name}"],
)  # fmt: skip
def test_a_file_that_only_says_is_used(tmp_path: Path, more: str) -> None:
    assert said_of(tmp_path, more) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("process_docs: !function utils.f", "mine.yaml:7 has !function, which runs Python"),
        ("a: [{b: [!!python/name:os.system x]}]", "mine.yaml:7 has tag:yaml.org,2002:python/name"),
        ("? !function utils.f\n: 1", "has !function"),
        ("include: part.yaml", "part.yaml:2 has !function"),
        ("include: [lm_eval/tasks/own.yaml, lm_eval/../part.yaml]", "part.yaml:2 has !function"),
        ("include: none.yaml", "none.yaml is no YAML file \\(.*No such file"),
        ("x: [", "mine.yaml is no YAML file"),
        ("a: {dataset_path: pandas}", "mine.yaml:7: dataset_path pandas is none of json, csv"),
        ("a: {dataset_path: ./data}", "dataset_path ./data is none of"),
        ("a: {dataset_path: HERE/lm_eval}", "dataset_path .*lm_eval is none of"),
        ('a: {"dataset_k\\x77args": {data_files: ["a", "https://b/c"]}}', "dataset_kwargs names an address"),
        ("use_prompt: 'promptsource:x'", "use_prompt takes prompts from elsewhere"),
        ("metric_list: [{metric: ./program}]", "metric ./program is none of lm-eval-harness: acc, exact"),
        ("a: [{metric: acc, hf_evaluate: true}]", "hf_evaluate takes a metric from elsewhere"),
    ],
)  # fmt: skip
def test_a_file_that_runs_or_fetches_is_not(tmp_path: Path, more: str, said: str) -> None:
    found = said_of(tmp_path, more.replace("HERE", str(tmp_path)))
    assert found and re.search(said, found[0]), found


def test_a_file_of_many_references_is_read_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    assert said_of(tmp_path, "\n".join(lines)) == []


def test_windows_of_a_text_do_not_overlap_and_the_last_is_whole() -> None:
    """Four positions, ten tokens: what the library's own docstring shows."""
    rows = list(rolling_rows(99, range(10), 4))
    assert [row.tokens.tolist() for row in rows] == [[99, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert [row.targets.tolist() for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [row.positions.tolist() for row in rows] == [[0, 1, 2, 3], [0, 1, 2, 3], [2, 3]]
    assert list(rolling_rows(99, [], 4)) == []
    (row,) = rolling_rows(99, [7, 8], 4)
    assert (row.tokens.tolist(), row.targets.tolist()) == ([99, 7], [7, 8])


@pytest.mark.parametrize(
    ("context", "more", "tokens", "targets"),
    [
        ([1, 2], [3], [1, 2], [3]),
        ([1, 2], [3, 4], [1, 2, 3], [3, 4]),
        ([1, 2, 3, 4], [5, 6], [2, 3, 4, 5], [5, 6]),
        ([1], [2, 3, 4, 5, 6, 7], [3, 4, 5, 6], [4, 5, 6, 7]),
        ([1], [], [], []),
    ],
)
def test_a_continuation_keeps_what_is_right_before_it(context, more, tokens, targets) -> None:
    row = scored_row(context, more, 4)
    assert (row.tokens.tolist(), row.targets.tolist()) == (tokens, targets)
    whole = np.array([*context, *more])
    assert all(whole[-len(row.tokens) - 1 :][p + 1] == t
               for p, t in zip(row.positions, row.targets, strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "longest", "stops"),
    [
        ({}, 256, []),
        ({"until": "\n", "max_gen_toks": 5, "do_sample": False, "temperature": 0.7}, 5, ["\n"]),
        ({"until": ["a", "b"], "max_new_tokens": "7", "temperature": 0.0}, 7, ["a", "b"]),
        ({"max_tokens": 3, "max_gen_toks": None}, 3, []),
    ],
)
def test_how_a_continuation_ends(asked: Mapping[str, Any], longest: int, stops: list[str]) -> None:
    assert new_tokens("mine", asked) == (longest, stops)


@pytest.mark.parametrize("asked", [{"do_sample": True}, {"temperature": 0.5}])
def test_tokens_are_not_drawn(asked: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--lm-eval mine draws its tokens"):
        new_tokens("mine", asked)
