"""`make timeline`: real steps of several processes beside their plan, as pictures and Chrome traces.

Writes docs/images/timeline-<name>.svg and .json.gz; another folder with --folder.
"""

from __future__ import annotations

import argparse
import gzip
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEP = 4
"""The recorded iteration; the ones before it warm up."""

MODEL = (
    "--num-layers {layers} --hidden-size {hidden} --num-attention-heads 4 --seq-length 128 "
    "--max-position-embeddings 128 --vocab-size 2047 --hidden-dropout 0 --attention-dropout 0 "
    "--mock-data --tokenizer-type NullTokenizer --lr 1e-4 --eval-iters 0 "
)
DEEP = MODEL.format(layers=8, hidden=256) + (
    "--micro-batch-size 4 --global-batch-size 32 --ddp-bucket-size 800000 "
    "--pipeline-model-parallel-size 2 "
)
WIDE = MODEL.format(layers=2, hidden=512) + (
    "--micro-batch-size 8 --global-batch-size 8 --tensor-model-parallel-size 2 "
)
SHARED = MODEL.format(layers=8, hidden=256) + ("--micro-batch-size 8 --global-batch-size 32 ")
RUNS = {
    "pp2-dp2": (4, DEEP),
    "pp2-dp2-zb-v": (4, DEEP + "--pipeline-schedule zb-v"),
    "tp2": (2, WIDE),
    "dp2-zero1": (
        2,
        SHARED + "--zero-stage 1 --ddp-bucket-size 800000 --overlap-param-gather",
    ),
    "dp2-zero3": (2, SHARED + "--zero-stage 3"),
}
"""Name -> processes, and the run's flags."""


def record(ranks: int, flags: str, folder: Path) -> Path:
    """Train a few steps; returns the timeline of one of them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    told = (
        f"--train-iters {STEP + 1} --profile-timeline --profile-step-start {STEP} "
        f"--profile-step-end {STEP + 1} --save {folder} --save-interval 1000"
    )
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
         "--master-port", str(port), str(ROOT / "tools" / "pretrain_gpt.py"),
         *flags.split(), *told.split()],
        check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return folder / "traces" / "timeline.json"


def draw(ranks: int, flags: str, recorded: Path, picture: Path) -> str:
    """The plan's picture with the real step below; returns the same as text."""
    plan = [
        sys.executable, str(ROOT / "tools" / "plan.py"), *flags.split(),
        "--world-size", str(ranks), "--beside", str(recorded),
    ]  # fmt: skip
    subprocess.run(
        [*plan, "--draw", str(picture)], check=True, timeout=60, stdout=subprocess.DEVNULL
    )
    shown = subprocess.run(
        [*plan, "--draw", "-"], check=True, timeout=60, capture_output=True, text=True
    )
    return shown.stdout


def main() -> int:
    """Run, draw, pack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="run", help=f"of {', '.join(RUNS)}; all by default"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "images")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    for name in asked.names or RUNS:
        ranks, flags = RUNS[name]
        with tempfile.TemporaryDirectory() as folder:
            recorded = record(ranks, flags, Path(folder))
            picture = asked.folder / f"timeline-{name}.svg"
            print(draw(ranks, flags, recorded, picture))
            trace = picture.with_suffix(".json.gz")
            trace.write_bytes(gzip.compress(recorded.read_bytes(), mtime=0))
        print(
            f"{picture}: {picture.stat().st_size:,} bytes, {trace}: {trace.stat().st_size:,} bytes"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
