"""lm-eval-harness's tasks by our scorer and generation give what its own transformers backend gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.cli import evaluate
from tests.support.extras import needs
from tests.support.huggingface import gpt2, tokenizer_files, tool

pytestmark = pytest.mark.oracles
TASKS = {
    "toy_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "gold",
        "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "toy_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "toy_answer": {
        "output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "answer",
        "generation_kwargs": {"until": ["q"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip
"""Offline: YAML files beside a file of JSON lines."""


def write_tasks(folder: Path, answers: Sequence[str]) -> Path:
    """The three tasks; answers: of the last one."""
    folder.mkdir()
    questions = ["the thin hint is in", "the inner tin is", "then other things"]
    docs = [
        {"question": question, "choices": [" the", " ether", " tin"], "gold": n % 3, "answer": answer,
         "text": f"{question} {'the inner ether tin then ' * (9 * n + 1)}"}
        for n, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]  # fmt: skip
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = {"data_files": {"test": str(folder / "docs.jsonl")}}
    for name, task in TASKS.items():
        whole = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": data,
            "test_split": "test",
            **task,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    return folder


def theirs(path: Path, tasks: Path) -> dict[str, Any]:
    """By lm-eval's transformers backend."""
    library, models = needs("lm_eval"), needs("lm_eval.models.huggingface")
    transformers = needs("transformers")
    tokenizer = transformers.GPT2Tokenizer(str(path / "vocab.json"), str(path / "merges.txt"))
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    backend = models.HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)
    manager = needs("lm_eval.tasks").TaskManager(include_path=str(tasks))
    found: dict[str, Any] = library.simple_evaluate(
        model=backend, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0
    )
    return found


def test_three_tasks_equal_the_transformers_backend(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path, file = tmp_path / "gpt2", tmp_path / "found.json"
    gpt2(n_positions=64).save_pretrained(path)
    tokenizer_files(path, "vocab.json", "merges.txt")
    first = theirs(path, write_tasks(tmp_path / "tasks", ["", "", ""]))
    said = [sample["filtered_resps"][0] for sample in first["samples"]["toy_answer"]]
    assert any(said)
    # what it generated is right but for one: both must generate the same
    tasks = write_tasks(tmp_path / "again", [said[0], said[1], "no"])
    expected = theirs(path, tasks)["results"]
    words = ["--lm-eval", *TASKS, "--include-path", tasks, "--use-cpu", "--json", file]
    assert tool(evaluate.main, monkeypatch, "--load", path, *words) == 0, capsys.readouterr().err
    (result,) = json.loads(file.read_text())["results"]
    assert result["tasks"]["toy_answer"]["exact_match,none"] == pytest.approx(2 / 3)
    for name in TASKS:
        for metric, value in result["tasks"][name].items():
            if "stderr" not in metric:
                assert value == pytest.approx(expected[name][metric], rel=1e-5), (name, metric)
    assert tool(evaluate.main, monkeypatch, "--load", path, "--lm-eval", "no_such_task") == 2
    assert "--lm-eval no_such_task: no task of lm-eval-harness" in capsys.readouterr().err
