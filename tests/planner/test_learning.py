"""tools/plan.py --advise: a law's numbers, the whole curve, and a warning for what is unusual."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from typing import Any

import pytest

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.cli import plan
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import parse
from megatron_lite.planner.law import budget_of, compute_optimal, flops_of_a_token

GPT = (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 256 --vocab-size 32768 "
    "--max-position-embeddings 256 --micro-batch-size 8 --global-batch-size 560 --bf16 --hardware a100-40g"
)
GOOD = "--lr 1.2e-3 --lr-decay-style cosine --lr-warmup-iters 500 --train-iters 53000"


@pytest.fixture
def advise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What --advise prints for these flags, read where it is JSON."""

    def asked(words: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["plan.py", "--advise", *f"{GPT} {words}".split()])
        assert plan.main() == 0
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in words else printed

    return asked


@pytest.mark.parametrize(
    ("layers", "hidden", "length", "goldens"),
    [
        (24, 1024, 256, (1.420e19, 7.526e9, 1.258e-3, 5.372e5)),
        (16, 1024, 512, (7.064e18, 5.399e9, 1.373e-3, 4.275e5)),
    ],
)
def test_the_law_gives_the_paper_s_numbers(layers, hidden, length, goldens) -> None:
    config = parse(
        f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads 16 --seq-length {length} "
        f"--max-position-embeddings {length} --vocab-size 999 --micro-batch-size 1 --train-iters 1 "
        "--lr 1".split()
    ).config
    figure = draw_up(config, 1).figure
    flops = flops_of_a_token(figure, length)
    assert flops == 72 * layers * hidden**2 + 12 * layers * hidden * length
    best = compute_optimal(flops)
    assert best == pytest.approx(goldens, rel=5e-4)
    assert budget_of(flops, best.tokens) == pytest.approx(best, rel=2e-3)


def test_json_has_the_curve_the_law_and_no_warning_for_what_is_usual(advise) -> None:
    found = advise(f"{GOOD} --json")
    assert found["warnings"] == []
    assert found["law"]["compute_optimal"]["learning_rate"] == pytest.approx(1.258e-3, rel=5e-4)
    run = found["run"]
    assert run["tokens"] == 53000 * 560 * 256 and run["batch_tokens"] == 560 * 256
    assert found["law"]["this_run"]["tokens"] == run["tokens"]
    assert run["tokens_per_parameter"] == run["tokens"] / found["model"]["num_parameters"]
    steps = [point["iteration"] for point in found["curve"]]
    assert steps[0] == 0 and steps[-1] == 53000 and 500 in steps and len(steps) >= 25
    assert all(
        point["tokens"] == point["samples"] * 256 == point["iteration"] * 560 * 256
        for point in found["curve"]
    )
    rates = [point["lr"] for point in found["curve"]]
    assert max(rates) == rates[steps.index(500)] == 1.2e-3 and rates[-1] == pytest.approx(
        0, abs=1e-18
    )


def test_the_picture_is_the_curve(advise) -> None:
    """Two cycles: a column of the picture has its one mark at the height of the rate."""
    text = advise(
        "--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-restarts 1 --train-iters 71000"
    )
    rows = [line.split("|")[1] for line in text.splitlines() if line.count("|") == 2][:10]
    assert {len(row) for row in rows} == {72}
    heights = [9 - "".join(row[column] for row in rows).index("*") for column in range(72)]
    assert all("".join(row[column] for row in rows).count("*") == 1 for column in range(72))
    assert heights[0] == heights[36] == 9 and heights[35] == heights[-1] == 1
    assert all(a >= b for a, b in pairwise(heights[:36]))
    assert all(abs(a - b) <= 1 for a, b in zip(heights[:35], heights[36:71], strict=True))
    assert "1.0e-03 |*" in text and "71,000|" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lr-decay-style constant", "the rate never decays: --lr-decay-style constant"),
        ("--min-lr 1.2e-3", "the rate never decays: --min-lr is --lr"),
        (
            "--lr-decay-iters 300000",
            "never decays in this run: it ends after 29,680,000 samples at 1.1",
        ),
        (
            "--lr-decay-style WSD --lr-decay-iters 90000 --lr-wsd-decay-iters 20000",
            "100% of the way",
        ),
        (
            "--lr-decay-iters 5000",
            "the decay is over after 2,800,000 of 29,680,000 samples: the rest of the run is at --min-lr 0;",
        ),
        (
            "--lr-decay-iters 90000 --lr-warmup-iters 60000",
            "the warm-up of 33,600,000 samples is not over",
        ),
        ("--lr 2e-5", "--lr 2e-05 is 1/63 of the law's 1.26e-03: such rates are for fine-tuning"),
        ("--optimizer adam8bit --lr 2e-4", "--lr 0.0002 is 1/6.3 of the law's 1.26e-03"),
        ("--lr 6e-3", "--lr 0.006 is 4.8 times the law's"),
        ("--train-iters 22000", "9.4 tokens per parameter"),
        (
            "--exit-duration-in-mins 600",
            "before --exit-duration-in-mins stops the run, at about step",
        ),
    ],
)
def test_what_is_unusual_is_said(words: str, said: str, advise) -> None:
    (warning,) = advise(f"{GOOD} {words} --json")["warnings"]
    assert said in warning


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("--optimizer sgd --lr 0.1", "--optimizer sgd has rates of its own"),
        ("--finetune --load x --lr 2e-5", "the law is one of pretraining from nothing"),
        ("--objective sft --lr 2e-5", "the law is one of pretraining from nothing"),
        ("--train-iters 80000", ""),
        (
            "--train-iters 900000",
            "the law was fitted from 1e+17 to 1e+20 FLOPs; this run takes 2.4",
        ),
    ],
)
def test_a_rate_is_compared_where_the_law_holds(words: str, note: str, advise) -> None:
    found = advise(f"{GOOD} {words} --json")
    assert found["warnings"] == []
    told = [one for one in found["notes"] if "the law" in one]
    assert [note in one for one in told] == [True] * bool(note)


def test_a_missing_rate_is_the_law_s_and_a_missing_length_is_asked_for(advise) -> None:
    found = advise("--tokens 7.5B --lr-decay-style cosine --json")
    rate = found["run"]["learning_rate"]
    assert rate == found["law"]["this_run"]["learning_rate"] == pytest.approx(1.26e-3, rel=1e-2)
    assert any(
        f"--lr is not given: the curve is of the law's {rate:.3e}" in n for n in found["notes"]
    )
    for words in ("--lr 1e-3", "--tokens 1B --train-iters 9", "--train-epochs 2"):
        with pytest.raises(ConfigError, match="one length of the run: .* or --tokens 20B"):
            advise(words)
    with pytest.raises(ConfigError, match="leave out --search and --draw"):
        advise("--lr 1e-3 --train-iters 9 --search")


def test_an_epoch_of_known_samples_is_a_length_and_a_floor_needs_no_rate(advise) -> None:
    found = advise("--train-epochs 3 --epoch-samples 560000 --min-lr 1e-3 --json")
    assert found["run"]["samples"] == 3 * 560000
    assert found["curve"][-1]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("words", "begins"),
    [("", True), ("--finetune --load x", False), ("--lora-rank 8 --load x --finetune", False),
     ("--objective sft", False)],
)  # fmt: skip
def test_tokens_per_parameter_are_about_pretraining(
    words: str, begins: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --advise, too: few tokens are what fine-tuning has."""
    asked = f"{GPT} --lr 1e-4 --train-iters 100 --json {words}"
    monkeypatch.setattr(sys, "argv", ["plan.py", *asked.split()])
    assert plan.main() == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any("tokens per parameter" in line for line in warnings) is begins
