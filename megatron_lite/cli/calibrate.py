"""Measure this machine for tools/plan.py: a few products, then some short real runs of the trainer.

python tools/calibrate.py --output ours.yaml        minutes; do nothing else on the machine meanwhile
python tools/plan.py --hardware ours.yaml <flags>

Writes a --hardware file with every rate and where it comes from, and prints how well it explains the
runs it was fitted on.  `make bench-plan` tries it on others.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from megatron_lite.blueprint.devices import ACCELERATORS, short_name
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.planner import calibrate
from megatron_lite.planner.calibrate import Trial
from megatron_lite.planner.hardware import DEVICES, Device
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.outputs import check_outputs, write_output

TOOL = Path(__file__).resolve().parents[2] / "tools" / "pretrain_gpt.py"
_MODEL = "--tokenizer-type NullTokenizer --num-attention-heads 8"
_ND = "--hidden-dropout 0 --attention-dropout 0"


def model(
    layers: int,
    hidden: int,
    *,
    seq: int,
    micro: int,
    batch: int,
    vocab: int = 4096,
    more: str = _ND,
) -> str:
    """Flags of a small GPT."""
    return (
        f"{_MODEL} --num-layers {layers} --hidden-size {hidden} --seq-length {seq} "
        f"--micro-batch-size {micro} --global-batch-size {batch} --vocab-size {vocab} {more}"
    )


def trials(*, gpu: bool, devices: int) -> list[Trial]:
    """What is run to learn a machine: each stresses another rate."""
    k = 4 if gpu else 1  # times wider, and as much longer
    low = "--bf16" if gpu else ""
    dropout = "--attention-dropout 0"
    found = [
        Trial("narrow", f"{model(4, 256 * k, seq=256 * k, micro=4, batch=4)} {low}"),
        Trial("wide", f"{model(2, 512 * k, seq=256 * k, micro=2, batch=4)} {low}"),
        Trial("long sequence", f"{model(3, 256 * k, seq=1024 * k, micro=1, batch=1)} {low}"),
        Trial(
            "few tokens", f"{model(2, 512 * k, seq=64 * k, micro=1, batch=1, vocab=16384)} {low}"
        ),
        Trial("dropout", f"{model(4, 256 * k, seq=256 * k, micro=4, batch=4, more=dropout)} {low}"),
    ]
    if devices > 1:
        narrow = f"{model(4, 256 * k, seq=256 * k, micro=4, batch=8)} {low}"
        four = f"{model(4, 256 * k, seq=256 * k, micro=4, batch=16)} {low}"
        found += [
            Trial("tp 2", f"{narrow} --tensor-model-parallel-size 2", 2),
            Trial("pp 2", f"{four} --pipeline-model-parallel-size 2", 2),
            Trial("dp 2", narrow, 2),
        ]
    return found


def measured_device(*, gpu: bool) -> Device:
    """The machine's fastest products and its memory, as a start for the fit."""
    name = torch.cuda.get_device_name() if gpu else "cpu"
    known = short_name(name)
    base = DEVICES.get(known or "", DEVICES["h100"]) if gpu else DEVICES["cpu"]
    place = torch.device("cuda" if gpu else "cpu")
    size = 8192 if gpu else 1024
    low, wide = (_products(size, dtype, place) for dtype in (torch.bfloat16, torch.float32))
    moved = _moving(place, 2**28 if gpu else 2**24)
    # the fit explains a share of each of these
    numbers = {
        "name": name,
        "matmul_tflops": low / 1e12,
        "fp32_rate": wide / low,
        "bandwidth_gb_s": moved / 1e9 if gpu else 4 * moved / 1e9,
        "memory_gb": _memory_bytes(gpu) / 1e9,
        "devices_per_node": torch.cuda.device_count() if gpu else os.cpu_count() or 1,
    }
    if known is None:
        numbers["peak_tflops"] = max(low, wide) / 1e12  # MFU is then a share of the best product
    if not gpu:
        # caches are faster than memory, and half of it reads
        numbers |= {"overlap": 0.0, "half_inner": 50.0, "memory_efficiency": 0.3,
                    "optimizer_efficiency": 0.2, "dropout_values": 10.0}  # fmt: skip
    here = "measured on this machine by tools/calibrate.py"
    sources = {**base.sources, **{name: here for name in numbers}}
    if known is not None:
        numbers["peak_tflops"] = ACCELERATORS[known].peak_tflops
        sources["peak_tflops"] = ACCELERATORS[known].source
    return dataclasses.replace(base, **numbers, sources=sources)  # type: ignore[arg-type]


def _products(size: int, dtype: torch.dtype, place: torch.device) -> float:
    x, y = (torch.randn(size, size, device=place).to(dtype) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: x @ y, place)


def _moving(place: torch.device, elements: int) -> float:
    x, y = (torch.ones(elements, device=place) for _ in range(2))
    return 8 * elements / _fastest(lambda: y.copy_(x), place)


def _fastest(work: Callable[[], object], place: torch.device, *, repeat: int = 7) -> float:
    """Seconds of the fastest of some repetitions."""
    found = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)


def _memory_bytes(gpu: bool) -> float:
    if gpu:
        return float(torch.cuda.get_device_properties(0).total_memory)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages / (os.cpu_count() or 1)  # per rank


def calibrated(steps: int, *, say: Callable[[str], None] = print) -> tuple[Device, list[Trial]]:
    """This machine's device and the trials that it was fitted on."""
    gpu = torch.cuda.is_available()
    if not gpu:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    start = measured_device(gpu=gpu)
    say(f"products {start.matmul_tflops:.3f} TFLOP/s in bf16, x {start.fp32_rate:.2f} in fp32; "
        f"memory {start.bandwidth_gb_s:.1f} GB/s")  # fmt: skip
    done = []
    for trial in trials(gpu=gpu, devices=start.devices_per_node):
        done.append(calibrate.measure_trial(trial, tool=TOOL, steps=steps, environment=os.environ))
        say(f"  {trial.name:<16}{done[-1].seconds * 1e3:>10.1f} ms per step")
    return calibrate.fit_device(start, done), done


def explained(device: Device, done: Sequence[Trial]) -> list[str]:
    """A line per trial: measured, predicted, error."""
    lines = [f"{'':<24}{'ranks':>6}{'measured':>12}{'predicted':>12}{'error':>9}"]
    for trial in done:
        off = calibrate.error(trial, device)
        lines.append(
            f"{trial.name:<24}{trial.ranks:>6}{trial.seconds * 1e3:>9.1f} ms"
            f"{trial.seconds * (1 + off) * 1e3:>9.1f} ms{off:>+9.1%}"
        )
    return lines


def main() -> int:
    """Measure, fit, write, print."""
    parser = ToolParser(description=__doc__, prog="calibrate.py")
    parser.add_argument("--output", required=True, metavar="FILE.yaml")
    parser.add_argument("--steps", type=int, default=10, help="of each short run; at least 4")
    own = parser.parse_args()
    path = Path(own.output)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--output {path}: --hardware takes files that end in .yaml")
    if own.steps < 4:
        raise ConfigError(f"--steps {own.steps} must be at least 4: the first two are left out")
    check_outputs("--output", [path], Disk())
    device, done = calibrated(own.steps)
    print("\n".join(explained(device, done)))
    write_output(path, calibrate.as_yaml(device).encode(), Disk())
    print(f"python tools/plan.py --hardware {path} ...")
    return 0


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, go_on="nothing was finished: start it again"))


if __name__ == "__main__":
    start()
