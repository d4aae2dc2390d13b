"""What the GPT-3 scripts need for a model of seconds: sizes, two corpora, a vocabulary."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.corpora import write_pair
from tests.support.places import ROOT

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
PATHS = ("run", "run/tb", "gpt2-vocab.json", "gpt2-merges.txt")
"""The scripts' four arguments, in the folder that make_folder filled."""


def make_folder(folder: Path) -> Path:
    """Token files of two corpora and a vocabulary of 257."""
    folder.mkdir()
    for corpus in ("wiki", "owt"):
        documents = ([(n * 7 + k * k) % 256 for k in range(30)] + [256] for n in range(100))
        write_pair(folder / f"{corpus}_text_document", documents)
    text = folder / "text.json"
    text.write_text('{"text": "one two three"}\n')
    tool = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), "--input", str(text)]
    subprocess.run(
        [*tool, "--vocab-size", "257", "--output-dir", str(folder)], check=True, timeout=60
    )
    return folder


def script_env(**env: str) -> dict[str, str]:
    """The scripts' environment in that folder; EXTRA_ARGS is added to, the rest replaces."""
    extra = f"--use-cpu --num-workers 0 {env.pop('EXTRA_ARGS', '')}"
    corpora = {f"DATASET_{n}": f"{name}_text_document" for n, name in ((1, "wiki"), (2, "owt"))}
    own = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "EXTRA_ARGS": extra}
    return {**own, **SIZES, **corpora, **env}
