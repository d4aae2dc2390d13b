"""`make bench-gpu` at toy sizes on a CPU: everyone trains the same model on the same batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.bench_gpu import main
from benchmarks.gpu.cases import CASES, TABLE, chosen
from benchmarks.gpu.contestants import LR, NotInstalled, Ours, Plain, Weights
from benchmarks.gpu.report import lines, verdicts
from benchmarks.gpu.turns import Found, Seen
from tests.support.extras import needs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arithmetic, sooner; what our kernels compile is kept for the whole process."""
    monkeypatch.setattr(torch, "compile", lambda what, **_: what)
    monkeypatch.setattr("benchmarks.gpu.cases.COMPILE", "--no-torch-compile")


@pytest.mark.ci
@pytest.mark.parametrize("key", TABLE)
def test_all_contestants_of_a_case_learn_alike(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if key == "8b":
        needs("transformers")
    (case,) = chosen(key, tiny=True)
    weights: Weights = {}
    losses: dict[str, list[float]] = {}
    for name, make in case.rows.items():
        if "dropout" in name or name == "ours, compiled":
            continue
        who = make(case, weights, CPU)
        if isinstance(who, Ours):
            weights = who.first_weights()
        elif isinstance(who, Plain):
            assert who.optimizer.param_groups[0]["lr"] == LR
        losses[name] = [float(who.step(batch)) for batch in case.batches(3)]
    ours, theirs = losses.values()
    assert ours == pytest.approx(theirs, abs=5e-3)  # bf16 products in another order


def test_documents_see_themselves_alone_by_each_kernel_that_runs_here() -> None:
    """On a CPU by a dense mask alone, and varlen is a row that says why it is not there."""
    (case,) = chosen("documents", tiny=True)
    (batch,) = case.batches(1)
    losses: dict[str, float] = {}
    for name, make in case.rows.items():
        if "varlen" in name:
            with pytest.raises(
                NotInstalled, match=r"torch-varlen does not run here: .*needs a GPU"
            ):
                make(case, {}, CPU)
        else:
            losses[name] = float(make(case, {}, CPU).step(batch))
    whole, apart, dense = losses.values()
    assert whole != apart == dense


def made_up(ours: float, baseline: float) -> Found:
    found: Found = {name: Seen([ours] * 3, [4.0]) for name in CASES["8b"](False).rows}
    found["Hugging Face, compiled"] = Seen([baseline] * 3, [4.0])
    return found


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (1.05, False)])
def test_a_ratio_is_judged_by_rounds(ours: float, met: bool) -> None:
    case = CASES["8b"](False)
    found = made_up(ours, 1.09)
    (text, judged), *_ = verdicts(case, found, lines(case, found, CPU))
    assert judged is met and f"{1.09 / ours:.3f}" in text


@pytest.mark.parametrize(("seconds", "slow"), [(8192 / 39.8e3, False), (8192 / 38.0e3, True)])
def test_a_slow_baseline_does_not_count(
    seconds: float, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    case, found = CASES["8b"](False), made_up(seconds / 1.2, seconds)
    made = lines(case, found, CPU)
    assert made[-1].note.startswith("baseline too slow") is slow
    (text, judged), *_ = verdicts(case, found, made)
    assert judged is not slow and ("does not count" in text) is slow


def test_what_is_not_installed_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*_: object) -> object:
        raise NotInstalled("transformers is not installed")

    monkeypatch.setattr("benchmarks.gpu.cases.hugging_face_llama", absent)
    file = tmp_path / "found.json"
    words = ["--rehearse", "--only", "8b", "--rounds", "1", "--steps", "1", "--json", str(file)]
    assert main(words) == 0
    assert "not installed: transformers is not installed" in capsys.readouterr().out
    (case,) = json.loads(file.read_text())["cases"]
    assert [row["row"] for row in case["rows"]] == list(CASES["8b"](True).rows)
    assert case["rows"][0]["tokens_per_second"] > 0


def test_a_case_that_is_not_there() -> None:
    with pytest.raises(
        SystemExit, match="no case '125m'; there are 124m, 8b, fp16, documents, all"
    ):
        chosen("124m,125m", tiny=True)
