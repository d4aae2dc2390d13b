"""The two GPT-3 scripts, tiny, for real: two CPU ranks, a stop, another layout, a TGS summary."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.data.indexed_builder import IndexedDatasetBuilder
from megatron_lite.telemetry.record import EvaluationRecord, StepRecord, read_metrics

ROOT = Path(__file__).resolve().parents[2]
GPT3 = ROOT / "examples/gpt3"
SIZES = {
    "NUM_NODES": "1",
    "GPUS_PER_NODE": "2",
    "PRECISION": "fp32",
    "NUM_LAYERS": "2",
    "HIDDEN_SIZE": "16",
    "NUM_ATTENTION_HEADS": "2",
    "SEQ_LENGTH": "16",
    "ATTENTION_BACKEND": "auto",
    "GLOBAL_BATCH_SIZE": "4",
    "TRAIN_ITERS": "4",
    "LR": "1e-3",
    "MIN_LR": "1e-4",
    "LR_DECAY_ITERS": "4",
    "LR_WARMUP_FRACTION": "0.25",
    "SPLIT": "80,10,10",
    "LOG_INTERVAL": "1",
    "EVAL_ITERS": "1",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Token files of two corpora and a vocabulary, in a folder with a space in its name."""
    folder = tmp_path / "a b"
    folder.mkdir()
    for corpus in ("wiki", "owt"):
        with IndexedDatasetBuilder(folder / f"{corpus}_text_document.bin") as builder:
            for number in range(100):
                document = [(number * 7 + k * k) % 256 for k in range(30)] + [256]
                builder.add_document(document, [len(document)])
            builder.finalize()
    text = folder / "text.json"
    text.write_text('{"text": "one two three"}\n')
    tool = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), "--input", str(text)]
    subprocess.run(
        [*tool, "--vocab-size", "257", "--output-dir", str(folder)], check=True, timeout=60
    )
    return folder


def run(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    paths = ["run", "run/tb", "gpt2-vocab.json", "gpt2-merges.txt"]
    corpora = {f"DATASET_{n}": f"{name}_text_document" for n, name in ((1, "wiki"), (2, "owt"))}
    extra = f"--use-cpu --num-workers 0 {env.pop('EXTRA_ARGS', '')}"
    return subprocess.run(
        ["bash", str(GPT3 / script), *paths],
        cwd=folder,
        env={
            **{"PATH": os.environ["PATH"], "PYTHON": sys.executable, "EXTRA_ARGS": extra},
            **SIZES,
            **corpora,
            **env,
        },
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_stopped_run_continues_at_another_layout_by_the_same_line(folder: Path) -> None:
    script = "train_gpt3_175b_distributed.sh"
    first = run(script, folder, TP="1", PP="2", EXTRA_ARGS="--exit-interval 2")
    assert first.returncode == 0, first.stdout + first.stderr
    second = run(script, folder, TP="2", PP="1")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "at iteration 2" in second.stdout
    records = read_metrics(folder / "run/metrics.jsonl")
    assert [r.iteration for r in records if isinstance(r, StepRecord)] == [1, 2, 3, 4]
    finals = [r for r in records if isinstance(r, EvaluationRecord) and r.final]
    assert {r.split for r in finals} == {"validation", "test"}
    assert (folder / "run/latest_checkpointed_iteration.txt").read_text().strip() == "4"


def test_tgs_trains_ten_iterations_and_ends_with_the_summary(folder: Path) -> None:
    sizes = {"TP": "2", "PP": "1", "TRAIN_ITERS": "", "EVAL_ITERS": "", "LR_DECAY_ITERS": "10"}
    done = run("train_gpt3_175b_distributed_tgs.sh", folder, **sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_metrics(folder / "run/tgs/metrics.jsonl")
    assert [r.iteration for r in records if isinstance(r, StepRecord)] == list(range(1, 11))
    assert not [r for r in records if isinstance(r, EvaluationRecord)]
    assert not list((folder / "run/tgs").rglob("optimizer-*"))
    summary = "\n".join(done.stdout.splitlines()[-2:])
    assert "(tgs)" in summary and "over 9 steps on 2 ranks" in summary
