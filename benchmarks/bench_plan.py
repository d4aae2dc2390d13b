"""`make bench-plan`: the planner is calibrated on some small runs and predicts the step times of others.

Prints how long a large search takes, alone with --search; then measured and predicted milliseconds of
each run with the error: first of the runs that calibrate, then of other sizes and layouts, which the fit
has not seen.  Baseline: the measured time itself.
Minutes; leave the machine alone meanwhile.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron_lite.cli.calibrate import TOOL, calibrated, explained, model
from megatron_lite.planner import calibrate
from megatron_lite.planner.calibrate import Trial

STEPS = 10


def others(*, gpu: bool, devices: int) -> list[Trial]:
    """Sizes and layouts that calibration does not run."""
    k = 4 if gpu else 1
    low = "--bf16" if gpu else ""
    middle = f"{model(6, 384 * k, seq=256 * k, micro=4, batch=8)} {low}"
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    found = [
        Trial("6 layers of 384", middle),
        Trial("wide, 4 samples", f"{model(4, 512 * k, seq=256 * k, micro=4, batch=8)} {low}"),
        Trial("8 layers, sequence 512", f"{model(8, 256 * k, seq=512 * k, micro=2, batch=4)} {low}"),
        Trial("full recompute", f"{middle} {full}"),
        Trial("untied, 16k words", f"{model(4, 384 * k, seq=256 * k, micro=4, batch=8, vocab=16000)} "
              f"--untie-embeddings-and-output-weights {low}"),
    ]  # fmt: skip
    if devices < 2:
        return found
    tp, pp = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
    deep = f"{model(8, 384 * k, seq=256 * k, micro=2, batch=16)} {low}"
    return [
        *found,
        Trial("tp 2, 6 layers of 512", f"{model(6, 512 * k, seq=256 * k, micro=4, batch=8)} {low} {tp}", 2),
        Trial("tp 2, sequence parallel", f"{middle} {tp} --sequence-parallel", 2),
        Trial("pp 2, 8 micro batches", f"{deep} {pp}", 2),
        Trial("pp 2, interleaved", f"{deep} {pp} --num-virtual-stages-per-pipeline-rank 2", 2),
        Trial("pp 2, zero bubble", f"{deep} {pp} --pipeline-schedule zb-h1", 2),
        Trial("dp 2, 6 layers of 384", middle, 2),
        Trial("dp 2, optimizer shared", f"{middle} --use-distributed-optimizer", 2),
    ]  # fmt: skip


SEARCH = "--hardware h100 --nodes 128 --search --preset gpt3-175b --bf16 --global-batch-size 1536"


def search_seconds() -> float:
    """CPU seconds of a search for 175B on 1,024 devices, in a process of its own."""
    plan = Path(__file__).resolve().parents[1] / "tools" / "plan.py"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, str(plan), *SEARCH.split()], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Search (alone with --search), calibrate, then measure and predict others."""
    print(f"search of 175B on 1,024 devices: {search_seconds():.1f} s of CPU (aim: 20)", flush=True)
    if "--search" in sys.argv:
        return
    device, fitted = calibrated(STEPS)
    print("\ncalibrated on")
    print("\n".join(explained(device, fitted)))
    gpu = torch.cuda.is_available()
    measured = []
    for trial in others(gpu=gpu, devices=device.devices_per_node):
        measured.append(
            calibrate.measure_trial(trial, tool=TOOL, steps=STEPS, environment=os.environ)
        )
        print(f"  measured {trial.name}", file=sys.stderr, flush=True)
    print("\npredicted")
    print("\n".join(explained(device, measured)))
    off = sorted(abs(calibrate.error(trial, device)) for trial in measured)
    print(f"median error {off[len(off) // 2]:.1%}, largest {off[-1]:.1%} of {len(off)} (aim: 15 %)")


if __name__ == "__main__":
    main()
