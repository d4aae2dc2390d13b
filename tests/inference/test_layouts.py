"""No layout of the ranks and no batch changes what an evaluation finds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.blueprint.grid import RankGrid
from megatron_lite.inference.evaluating.corpora import PerplexityOf
from megatron_lite.inference.evaluating.examinee import Exam, Examinee
from megatron_lite.inference.evaluating.multiple_choice import MultipleChoice
from megatron_lite.inference.evaluating.problems import WordProblems
from megatron_lite.inference.evaluating.question_files import CEVAL, MMLU
from megatron_lite.inference.evaluating.scorer import Scorer
from megatron_lite.inference.model import build_model, find_model
from megatron_lite.parallel.context import ParallelContext
from tests.support.ceval_toy import write_exam
from tests.support.corpora import write_pair
from tests.support.extras import needs
from tests.support.huggingface import gpt2, tokenizer_files
from tests.support.spawn import spawn


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads two ranks can share, and something for every exam."""
    needs("transformers")
    path = tmp_path_factory.mktemp("exams")
    model = gpt2(n_head=4, n_positions=120)
    with torch.no_grad():  # what it says depends on how much it has seen, at least
        model.transformer.wpe.weight.mul_(20.0)
    model.save_pretrained(path / "gpt2")
    tokenizer_files(path / "gpt2", "vocab.json", "merges.txt")
    (path / "text.txt").write_text(
        "the thin inner hint that this ether tin, the other things. " * 9
    )
    write_pair(path / "pair", [[n * n % 261 for n in range(k)] for k in (33, 1, 0, 7, 124, 260)])
    write_exam(path / "ceval")
    for split, count in (("dev", 2), ("test", 7)):
        (path / "mmlu" / split).mkdir(parents=True)
        lines = "".join(
            f"Which is {'the ' * n}{n}?,in,the,tin,hint,{'ABCD'[n % 4]}\n" for n in range(count)
        )
        (path / "mmlu" / split / f"virology_{split}.csv").write_text(lines)
    problems = [{"question": f"{n} and {'the ' * n}tin?", "answer": f"#### {n}"} for n in range(7)]
    (path / "gsm8k.jsonl").write_text("".join(json.dumps(one) + "\n" for one in problems))
    return path


def found(ctx: ParallelContext, batch_size: int) -> list[dict[str, Any]]:
    """Of all exams; the files are in this process's folder."""
    source = find_model(Path("gpt2"), ctx)
    tokenizer, _ = source.tokenizer(None, None, allowed=False)
    exams: list[Exam] = [
        PerplexityOf("--text", "text.txt", stride=17), PerplexityOf("--tokens", "pair", window=50),
        MultipleChoice(CEVAL, "ceval", shots=1, limit=3), MultipleChoice(MMLU, "mmlu", shots=2),
        WordProblems("gsm8k.jsonl", "gsm8k.jsonl", shots=1, max_new_tokens=9),
    ]  # fmt: skip
    for exam in exams:
        exam.look(source.config, tokenizer)
    model = build_model(source, ctx, dtype=torch.float32)
    examinee = Examinee(Scorer(model, batch_size), tokenizer)
    return [dict(exam.run(examinee).values) for exam in exams]


def on_ranks(rank: int, ranks: int, place: str, tp: int, pp: int) -> list[dict[str, Any]]:
    os.chdir(place)
    grid = RankGrid(tp=tp, pp=pp, dp=ranks // (tp * pp))
    return found(ParallelContext.from_grid(grid, rank, torch.device("cpu")), batch_size=2)


def require_same(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Counts, letters and texts to the letter, sums of log probabilities to their rounding."""
    for one, other in zip(ours, others, strict=True):
        for name, value in one.items():
            exact = not isinstance(value, float)
            assert other[name] == (value if exact else pytest.approx(value, rel=1e-6)), name


def test_no_batch_changes_a_result(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    one = found(ParallelContext.serial(), 8)
    letters = [s["letters"] for exam in one[2:4] for s in exam["subjects"].values()]
    assert len(set("".join(letters))) > 1 and len(set(one[4]["solutions"])) > 1
    for batch_size in (1, 3):
        require_same(one, found(ParallelContext.serial(), batch_size))


@pytest.mark.parametrize(
    ("tp", "pp", "dp"),
    [
        pytest.param(2, 2, 1, marks=pytest.mark.ci),
        pytest.param(1, 2, 2, marks=pytest.mark.slow),
        pytest.param(2, 1, 1, marks=pytest.mark.slow),
        pytest.param(1, 2, 1, marks=pytest.mark.slow),
        pytest.param(1, 1, 3, marks=pytest.mark.slow),
    ],
)
def test_no_layout_changes_a_result(
    place: Path, monkeypatch: pytest.MonkeyPatch, tp: int, pp: int, dp: int
) -> None:
    monkeypatch.chdir(place)
    one = found(ParallelContext.serial(), 8)
    for other in spawn(on_ranks, tp * pp * dp, str(place), tp, pp):
        require_same(one, other)
