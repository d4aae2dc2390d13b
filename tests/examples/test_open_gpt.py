"""AdamW against Sophia-G: the recipes as plans, the grid in small, and the verdict's arithmetic."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
import sys
from pathlib import Path

import pytest

from megatron_lite.blueprint.parameters import parameter_table, total_size
from megatron_lite.blueprint.stages import cut_stages
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.telemetry.record import EvaluationRecord, record_json
from tests.examples.systems import block, carried_out, planned_step
from tests.support.extras import needs
from tests.support.places import ROOT
from tests.telemetry.records import STEP


def planned(line: int, tmp_path: Path) -> RunConfig:
    """What a line of its README would train, by a stand-in for python that prints how it was called."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    done = carried_out(block("open_gpt")[line], PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    return parse(words[words.index("--gpus-per-node") + 2 :]).config


def parameters(config: RunConfig) -> int:
    """All but the table of positions."""
    model = config.model
    assert model.vocab_size is not None and model.max_position_embeddings is not None
    table = parameter_table(
        model, cut_stages([model.num_layers]), padded_vocab_size=model.vocab_size
    )
    return total_size(table) - model.max_position_embeddings * model.hidden_size


def test_full_is_the_system_s_command_with_a_warm_up_that_ends(tmp_path: Path) -> None:
    config = planned(1, tmp_path)
    model, train, rate = config.model, config.train, config.learning_rate
    assert parameters(config) == 6_832_768
    assert (model.num_layers, model.num_attention_heads, model.seq_length) == (2, 2, 64)
    assert model.hidden_dropout == model.attention_dropout == 0.1 and config.precision.fp16
    assert train.global_batch_size == 12 * 40 and train.train_iters == 2000
    assert train.global_batch_size * model.seq_length * train.eval_iters >= 20_000
    assert rate.lr_warmup_iters * 2 < train.train_iters and rate.min_lr == 6e-5


@pytest.mark.ci
def test_the_plan_of_full_is_the_readme_s() -> None:
    done = carried_out(block("open_gpt")[1])
    gib = re.search(r"\s(\d+\.\d+)\s+fits$", done.stdout, re.MULTILINE)
    step = planned_step(done.stdout)
    assert gib, done.stderr
    for language in ("README.md", "README.zh-CN.md"):
        text = (ROOT / "examples/open_gpt" / language).read_text("utf-8")
        assert f"{float(gib[1]):.1f} GiB" in text
        assert re.search(rf"GiB\D+{step:.2f} ", text)


@pytest.mark.ci
@pytest.mark.parametrize(("line", "gpus", "micro"), [(2, 8, 12), (3, 10, 8)])
def test_the_recipes_have_batches_of_480(line: int, gpus: int, micro: int, tmp_path: Path) -> None:
    config = planned(line, tmp_path)
    train = config.train
    assert (train.world_size, train.micro_batch_size, train.global_batch_size) == (gpus, micro, 480)
    # nanoGPT prints 123.59M
    assert parameters(config) == 123_587_328 and config.model.seq_length == 1024
    done = carried_out(block("open_gpt")[line])
    assert done.returncode == 0 and re.search(r" fits$", done.stdout, re.MULTILINE), done.stderr
    assert f"{480 // gpus // micro:,} micro batches of {micro} x dp {gpus}" in done.stdout


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"FULL": "1"}, "TEXT=FOLDER with train.bin, val.bin"),
        ({"RECIPE": "8x12x5"}, "TEXT=FOLDER with train.bin, val.bin"),
        ({"RECIPE": "8x12x4"}, "RECIPE=8x12x4 is a batch of 384, not of 480"),
        ({"RECIPE": "480"}, "give GPUS x MICRO BATCH x ACCUMULATIONS"),
        ({"DRY_RUN": "1"}, "DRY_RUN=1 is for FULL=1 and RECIPE"),
        ({"OPTIMIZERS": "adam lion"}, "OPTIMIZERS=lion: adam and sophiag are compared"),
        ({"RATES": "0.001"}, "RATES=0.001: write a rate as 6e-4"),
        ({"TEXT": "/dev"}, "TEXT=/dev holds no train.bin"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_said_at_the_start(
    env: dict[str, str], said: str, tmp_path: Path
) -> None:
    done = carried_out("examples/open_gpt/run.sh", OUT=str(tmp_path), **env)
    assert done.returncode == 2 and said in done.stderr
    assert done.stderr.startswith("FATAL[2] rank=- step=-: ")


LOSSES = {"adam": {1: 4.0, 2: 4.2, 3: 4.1}, "sophiag": {1: 3.8, 2: 4.1, 3: 4.0}}


def write_run(
    out: Path, name: str, rate: str, seed: int, loss: float, tokens: int = 30_000
) -> None:
    """A run that ended with this loss held out, and one less of what it read."""
    folder = out / f"runs/{name}_{rate}_{seed}"
    folder.mkdir(parents=True)
    results = [{"file": f"x/{part}", "loss": end, "tokens": tokens} for part, end in (
        ("val", loss), ("seen", loss - 1))]  # fmt: skip
    (folder / "losses.json").write_text(json.dumps({"results": results}))
    wins = {"curvature/win_rate": 0.25} if name == "sophiag" else {}
    steps = [dataclasses.replace(STEP, iteration=n, loss=7.0 - n, metrics=wins) for n in (1, 2)]
    evaluation = EvaluationRecord(iteration=2, split="validation", samples=9, loss=loss, seconds=1)
    lines = [record_json(one) for one in (*steps, evaluation)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.ci
def test_the_verdict_pairs_runs_of_a_rate_and_a_seed(tmp_path: Path) -> None:
    for name, by_seed in LOSSES.items():
        for seed, loss in by_seed.items():
            write_run(tmp_path, name, "6e-4", seed, loss)
            # AdamW likes the higher rate better, Sophia-G the lower one
            write_run(tmp_path, name, "1e-3", seed, loss + (-0.1 if name == "adam" else 0.5))
    done = carried_out(f"{sys.executable} examples/open_gpt/verdict.py {tmp_path}")
    assert done.returncode == 0, done.stderr
    adam, sophia = LOSSES["adam"], LOSSES["sophiag"]
    apart = [100 * (sophia[seed] / adam[seed] - 1) for seed in (1, 2, 3)]
    row = (
        f"| 0.0006 | {statistics.fmean(adam.values()):.4f} ± {statistics.stdev(adam.values()):.4f} | "
        f"{statistics.fmean(sophia.values()):.4f} ± {statistics.stdev(sophia.values()):.4f} | "
        f"{statistics.fmean(apart):+.2f} ± {statistics.stdev(apart):.2f} |"
    )
    assert row in done.stdout and row in (tmp_path / "table.md").read_text("utf-8")
    best = [100 * (sophia[seed] / (adam[seed] - 0.1) - 1) for seed in (1, 2, 3)]
    assert (
        f"| each at its best | at 0.001 | at 0.0006 | {statistics.fmean(best):+.2f} ± "
        f"{statistics.stdev(best):.2f} |" in done.stdout
    )
    assert "0 of 12" in done.stdout
    assert "Sophia-G at 0.0006: 25.0% of its coordinates are not clipped" in done.stdout
    assert (tmp_path / "best").read_text().strip().endswith("sophiag_6e-4_1")
    write_run(tmp_path, "adam", "2e-3", 1, 4.0, tokens=768)
    few = carried_out(f"{sys.executable} examples/open_gpt/verdict.py {tmp_path}")
    assert few.returncode == 3 and "a loss over 768 tokens says little" in few.stderr


def test_the_verdict_sees_a_run_that_has_not_learned(tmp_path: Path) -> None:
    write_run(tmp_path, "adam", "6e-4", 1, 4.0)
    path = tmp_path / "runs/adam_6e-4_1/metrics.jsonl"
    path.write_text(record_json(dataclasses.replace(STEP, loss=math.nan)) + "\n")
    done = carried_out(f"{sys.executable} examples/open_gpt/verdict.py {tmp_path}")
    assert done.returncode == 1 and "not learned: 1 of 1" in done.stdout


def test_both_languages_have_the_same_numbers() -> None:
    """And a difference of means is near the mean of differences."""
    found = [
        [re.findall(r"[+-]?\d+\.\d+", line) for line in path.read_text("utf-8").splitlines()
         if re.match(r"\| (0\.\d+|each|各取)", line)]
        for path in sorted((ROOT / "examples/open_gpt").glob("README*.md"))
    ]  # fmt: skip
    assert found[0] == found[1] and len(found[0]) == 10
    for rate, adam, _, sophia, _, apart, _ in (row for row in found[0] if len(row) == 7):
        assert 100 * (float(sophia) / float(adam) - 1) == pytest.approx(float(apart), abs=0.05), (
            rate
        )


@pytest.mark.slow
def test_the_grid_in_small_goes_as_printed_and_is_not_made_twice(tmp_path: Path) -> None:
    """Two rates, both optimizers; a second call, with a seed more, makes only what is new."""
    needs("tokenizers")
    out = tmp_path / "out"
    command = block("open_gpt")[0]
    small = {"OUT": str(out), "STEPS": "20", "RATES": "1e-3 2e-3"}
    first = carried_out(command, **small, SEEDS="1")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert (
        "4 runs of 20 steps, 2 at a time" in first.stdout and "not learned: 0 of 4" in first.stdout
    )
    assert (out / "curves.png").is_file() and "open_gpt took " in first.stdout
    sample = block("open_gpt")[4].replace("python ", f"{sys.executable} ")
    sample = sample.replace("RUN", (out / "best").read_text().strip()).replace(
        "FILE:", f"FILE:{out}/"
    )
    said = carried_out(sample)
    assert said.returncode == 0 and said.stdout.count("Return the") >= 10, said.stderr
    made = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/losses.json")}
    again = carried_out(command, **small, SEEDS="1 2")
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert again.stdout.count(" is there\n") == 4 and "not learned: 0 of 8" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert re.search(r"\| each at its best \| at .* \| [+-]\d+\.\d\d ± ", again.stdout)


@pytest.mark.slow
def test_a_run_of_the_grid_that_fails_ends_it(tmp_path: Path) -> None:
    """Ids that the vocabulary does not have: the trainer says so, and no table is made."""
    text = tmp_path / "text"
    text.mkdir()
    for name in ("train.bin", "val.bin"):
        (text / name).write_bytes(b"\x07\x00" * 40_000)
    (text / "gpt2-vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    (text / "gpt2-merges.txt").write_text("#version: 0.2\n")
    small = {"OUT": str(tmp_path / "out"), "TEXT": str(text), "SEEDS": "1", "OPTIMIZERS": "adam"}
    done = carried_out(block("open_gpt")[0], **small, RATES="1e-3 2e-3")
    assert done.returncode not in (0, 3), done.stdout[-3000:] + done.stderr[-3000:]
    assert "FATAL[3]" in done.stderr and "difference in" not in done.stdout
