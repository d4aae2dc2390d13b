"""lm-eval-harness's tasks by our scorer and generation give what its own transformers backend gives."""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.blueprint.grid import RankGrid
from megatron_lite.cli import convert, evaluate
from megatron_lite.inference.evaluating.examinee import Examinee
from megatron_lite.inference.evaluating.harness import HarnessTasks, harness
from megatron_lite.inference.evaluating.scorer import Scorer
from megatron_lite.inference.model import build_model, find_model
from megatron_lite.parallel.context import ParallelContext
from tests.support.begun import speaks, write_llama
from tests.support.extras import needs
from tests.support.huggingface import gpt2, tokenizer_files, tool
from tests.support.places import ROOT
from tests.support.spawn import spawn

pytestmark = pytest.mark.oracles
TASKS: Mapping[str, Mapping[str, Any]] = {
    "toy_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "gold",
        "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "toy_shots": {
        "output_type": "multiple_choice", "doc_to_text": "{{question | trim}} ", "doc_to_target": "gold",
        "doc_to_choice": "choices", "num_fewshot": 2, "fewshot_split": "test",
        "metric_list": [{"metric": "acc"}],
    },
    "toy_nothing_before": {
        "output_type": "loglikelihood", "doc_to_text": "", "target_delimiter": "",
        "doc_to_target": "short", "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "toy_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"},
                        {"metric": "bits_per_byte"}],
    },
    "toy_answer": {
        "output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "answer",
        "generation_kwargs": {"until": ["eh", "srd", "der", "oi"], "max_gen_toks": 9, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip
"""Offline: YAML files beside a file of JSON lines."""


WORDS = ("the", "thin", "inner", "hint", "that", "ether", "tin", "is", "in", "other", "things")


def write_tasks(folder: Path) -> Path:
    """The tasks, two in a group; some texts are longer than the models' 64 positions."""
    folder.mkdir(parents=True)
    rng, words = random.Random(5), list(WORDS)
    docs = []
    for n in range(12):
        question, answer, *choices = (
            " ".join(rng.choices(words, k=k)) for k in (rng.choice([3, 9, 40]), 2, 1, 2, 3)
        )
        text = " ".join(rng.choices(words, k=rng.choice([1, 20, 90])))
        docs.append({"question": question, "choices": [f" {c}" for c in choices], "gold": n % 3,
                     "answer": answer, "short": answer, "text": text})  # fmt: skip
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = {"data_files": {"test": str(folder / "docs.jsonl")}}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    for name, task in TASKS.items():
        # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))
    group = {"group": "toys", "task": ["toy_choice", "toy_shots"], "aggregate_metric_list": [
        {"metric": "acc", "aggregation": "mean", "weight_by_size": True}]}  # fmt: skip
    (folder / "toys.yaml").write_text(json.dumps(group))
    return folder


def write_gpt2(path: Path) -> None:
    model = gpt2(n_head=4, n_positions=64)
    speaks(model.transformer.wte)
    with torch.no_grad():  # or it says one word only
        model.transformer.ln_f.bias.zero_()
        model.transformer.wte.weight.mul_(3.0)
    model.save_pretrained(path)
    tokenizer_files(path, "vocab.json", "merges.txt")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two models, the tasks, and what is cached of their data."""
    path = tmp_path_factory.mktemp("harness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(path / "cache"))
        needs("lm_eval")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", path / "cache")
        write_gpt2(path / "gpt2")
        write_llama(path / "llama")
        write_tasks(path / "tasks")
        yield path


def theirs(path: Path, tasks: Path, names: list[str]) -> dict[str, Any]:
    """By lm-eval's transformers backend."""
    evaluator, models = needs("lm_eval.evaluator"), needs("lm_eval.models.huggingface")
    backend = models.HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=1)
    manager = needs("lm_eval.tasks").TaskManager(include_path=str(tasks), include_defaults=False)
    found: dict[str, Any] = evaluator.simple_evaluate(
        model=backend, tasks=names, task_manager=manager, bootstrap_iters=1000
    )
    return found


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_tasks_equal_the_transformers_backend(
    place: Path, tmp_path: Path, monkeypatch, capsys, model: str
) -> None:
    names = ["toys", "toy_nothing_before", "toy_text", "toy_answer"]
    first = theirs(place / model, place / "tasks", ["toy_answer"])
    said = [sample["filtered_resps"][0] for sample in first["samples"]["toy_answer"]]
    assert any(said) and len({len(one) for one in said}) > 1
    # what they generate is right but for one: ours must be the same
    tasks = write_tasks(tmp_path / "tasks")
    docs = [json.loads(line) for line in (tasks / "docs.jsonl").read_text().splitlines()]
    for doc, answer in zip(docs[1:], said[1:], strict=True):
        doc["answer"] = answer
    (tasks / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    expected = theirs(place / model, tasks, names)
    file = tmp_path / "found.json"
    words = ["--lm-eval", *names, "--include-path", tasks, "--use-cpu", "--json", file]
    capsys.readouterr()
    assert tool(evaluate.main, monkeypatch, "--load", place / model, *words) == 0
    out = capsys.readouterr().out
    (result,) = json.loads(file.read_text())["results"]
    assert set(result["tasks"]) == set(expected["results"]) == {*TASKS, "toys"}
    compared = 0
    for name, values in expected["results"].items():
        for metric, value in values.items():
            if isinstance(value, float) and value == value:
                assert result["tasks"][name][metric] == pytest.approx(value, rel=1e-5), (
                    name,
                    metric,
                )
                compared += 1
    assert compared > 15
    assert result["tasks"]["toy_answer"]["exact_match,none"] == pytest.approx(11 / 12)
    assert result["shots"]["toy_shots"] == 2 and result["shortened"] > 0
    line = next(line for line in out.splitlines() if line.startswith("toy_answer"))
    assert line.split()[:4] == ["toy_answer", "0", "exact_match", "0.9167"]


def on_ranks(rank: int, ranks: int, place: str, tp: int, pp: int, batch_size: int) -> Any:
    dp = ranks // (tp * pp)
    ctx = ParallelContext.from_grid(RankGrid(tp=tp, pp=pp, dp=dp), rank, torch.device("cpu"))
    return answers(Path(place), ctx, batch_size)


def answers(place: Path, ctx: ParallelContext, batch_size: int) -> Any:
    source = find_model(place / "llama", ctx)
    tokenizer, _ = source.tokenizer(None, None, allowed=False)
    exam = HarnessTasks(["toys", "toy_text", "toy_answer"], str(place / "tasks"))
    exam.look(source.config, tokenizer)
    model = build_model(source, ctx, dtype=torch.float32)
    return exam.run(Examinee(Scorer(model, batch_size), tokenizer)).values["tasks"]


@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 2, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_no_layout_and_no_batch_changes_a_result(place: Path, tp: int, pp: int, dp: int) -> None:
    one = answers(place, ParallelContext.serial(), 5)
    for found in spawn(on_ranks, tp * pp * dp, str(place), tp, pp, 2):
        for task, values in one.items():
            assert found[task] == pytest.approx(values, rel=1e-5), task


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["no_such_task"], 2, "--lm-eval no_such_task: there is no such task in lm-eval-harness, nor in "),
        (["broken"], 2, "there is no such task .*broken.yaml is no YAML file"),
        (["runs"], 2, "--lm-eval runs: .*runs.yaml:1 has !function, which runs Python"),
        (["with_runs"], 2, "--lm-eval with_runs: .*runs.yaml:1 has !function"),
        (["tagged"], 2, "--lm-eval tagged: .*runs.yaml:1 has !function"),
        (["reaches"], 3, "--lm-eval reaches cannot be read, .*SecurityError"),
        (["lacks"], 3, "--lm-eval lacks cannot be read, .*UndefinedError"),
        (["absent"], 3, "--lm-eval absent cannot be read, and nothing is fetched"),
        (["far"], 3, "--lm-eval far cannot be read, and nothing is fetched"),
        (["long"], 2, "long generates up to 64 tokens, which leaves no room .* 64 positions"),
        (["drawn"], 2, "--lm-eval drawn draws its tokens"),
        (["humaneval"], 3, "humaneval cannot be read, and nothing is fetched"),
        (["lambada_openai"], 3, "lambada_openai cannot be read, and nothing is fetched"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(
    place: Path, tmp_path: Path, monkeypatch, capsys, words: list[str], code: int, said: str
) -> None:
    """Offline, without running anything of a file, and with the exit code of what is wrong."""
    tasks = write_tasks(tmp_path / "tasks")
    plain = json.loads((tasks / "toy_answer.yaml").read_text())
    flag = tmp_path / "ran"
    (tasks / "utils.py").write_text(f"from pathlib import Path\nPath({str(flag)!r}).touch()\n")
    (tasks / "runs.yaml").write_text(
        json.dumps(plain | {"task": "runs", "tag": "tagged"})[:-1] + ", process_docs: !function utils.f}"
    )  # fmt: skip
    reach = "{{''.__class__.__mro__[1].__subclasses__()}}"
    for name, more in {
        "reaches": {"doc_to_text": reach}, "lacks": {"doc_to_text": "{{nothing.of}}"},
        "absent": {"dataset_kwargs": {"data_files": str(tmp_path / "none.jsonl")}},
        "far": {"dataset_path": "someone/something"},
        "long": {"generation_kwargs": {"max_gen_toks": 64}},
        "drawn": {"generation_kwargs": {"do_sample": True, "temperature": 1.0}},
    }.items():  # fmt: skip
        (tasks / f"{name}.yaml").write_text(json.dumps({**plain, **more, "task": name}))
    (tasks / "broken.yaml").write_text("task: broken\n x: [")
    (tasks / "with_runs.yaml").write_text("group: with_runs\ntask: [toy_choice, runs]\n")

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    words = ["--lm-eval", *words, "--include-path", str(tasks), "--use-cpu"]
    assert tool(evaluate.main, monkeypatch, "--load", place / "gpt2", *words) == code
    err = capsys.readouterr().err
    line = next(line for line in err.splitlines() if line.startswith("FATAL"))
    assert re.search(said, line), err
    assert "Traceback" not in err and not flag.exists()


def test_a_run_keeps_what_was_found(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    assert tool(convert.main, monkeypatch, place / "gpt2", run) == 0
    words = [
        "--lm-eval",
        "toy_choice",
        "--include-path",
        place / "tasks",
        "--limit",
        5,
        "--use-cpu",
    ]
    assert tool(evaluate.main, monkeypatch, "--load", run, *words, "--num-fewshot", 1) == 0
    (file,) = (run / "evaluations").iterdir()
    (result,) = json.loads(file.read_text())["results"]
    assert result["shots"] == {"toy_choice": 1}
    assert result["samples"] == {"toy_choice": {"original": 12, "effective": 5}}


def test_the_guide_goes_as_printed(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Its command, on its own file of a task."""
    text = (ROOT / "docs/guides/evaluate.md").read_text(encoding="utf-8")
    (words,) = (line.split() for line in text.splitlines() if "--lm-eval toy" in line)
    (task,) = re.findall(r"^  ```yaml\n(.*?)^  ```$", text, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(textwrap.dedent(task))
    shutil.copy(place / "tasks" / "docs.jsonl", tmp_path / "tasks" / "questions.jsonl")
    monkeypatch.chdir(tmp_path)
    assert tool(convert.main, monkeypatch, place / "gpt2", "run") == 0
    assert words[:2] == ["python", "tools/evaluate.py"]
    assert tool(evaluate.main, monkeypatch, *words[2:], "--use-cpu") == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("toy_choice"))
    assert line.split()[:3] == ["toy_choice", "1", "acc"] and len(line.split()) == 5


def test_the_library_renders_in_a_sandbox_and_stays_offline() -> None:
    from jinja2.exceptions import SecurityError

    theirs = harness()
    with pytest.raises(SecurityError):
        theirs.utils.apply_template("{{''.__class__.__mro__}}", {})
    assert theirs.utils.apply_template("{{a | regex_replace('b', 'c')}}\n", {"a": "ab"}) == "ac\n"
    assert sys.modules["datasets"].config.HF_HUB_OFFLINE
