"""`make bench-offload`: a step with --optimizer-cpu-offload beside one without, alternating in one process.

    on a GPU    1.3 billion parameters in bf16, 8 micro batches of 2 x 2048
    on a CPU    25 million in bf16, 2 micro batches of 2 x 128: host and device are one, which shows
                what portions and buffers cost, and nothing of a link

Prints the median ratio of step times over the pairs, the same of the update alone, what each keeps on
the device, and bytes per second both ways.  Both wait for the device before their update.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.config.flags.parser import parse
from megatron_lite.data.batch import Batch
from megatron_lite.optim.groups import Rates
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import begin_step, settle

COMMON = (
    "--vocab-size 8192 --mock-data --hidden-dropout 0 --attention-dropout 0 --micro-batch-size 2 "
    "--train-iters 1000 --lr 1e-4 --tokenizer-type NullTokenizer --bf16 "
)
SIZES = {
    "cuda": "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 "
    "--global-batch-size 16",
    "cpu": "--num-layers 6 --hidden-size 512 --num-attention-heads 8 --seq-length 128 --global-batch-size 4",
}
HOST = "--optimizer-cpu-offload"


@dataclass(slots=True)
class Seen:
    """Seconds of its steps and of their updates, losses, and bytes it keeps on a GPU."""

    steps: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    kept: int = 0


class Contestant:
    """One trainer, which counts what it takes."""

    def __init__(self, flags: str, device: torch.device) -> None:
        before = _held(device)
        config = parse(flags.split()).config
        blueprint = draw_up(config, 1)
        self.parameters = blueprint.num_parameters
        self.device, self.seen = device, Seen()
        self.run = assemble(config, blueprint, ParallelContext.serial(device))
        self.seen.kept = _held(device) - before
        self._data = _batches(
            blueprint.microbatches(), config.train.micro_batch_size, config.model.seq_length
        )

    def step(self) -> None:
        """One more."""
        batches = next(self._data)
        _wait(self.device)
        began = time.perf_counter()
        begun = begin_step(self.run, batches)
        _wait(self.device)
        half = time.perf_counter()
        result = settle(self.run, begun, Rates(1e-4, 0.1))
        _wait(self.device)
        ended = time.perf_counter()
        self.run.progress.step += 1
        self.seen.steps.append(ended - began)
        self.seen.updates.append(ended - half)
        self.seen.losses.append(result.loss.item())


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _batches(number: int, micro: int, length: int) -> Iterator[list[Batch]]:
    mask = np.ones((micro, length), dtype=np.float32)
    for seed in itertools.count():
        random = np.random.default_rng(seed)
        yield [
            Batch(random.integers(0, 8192, (micro, length + 1)), np.arange(micro), mask)
            for _ in range(number)
        ]


def compare(
    flags: str, device: torch.device, *, pairs: int, warm: int = 2
) -> tuple[Seen, Seen, int]:
    """(without, with), each pair of steps one after the other; and the number of parameters."""
    both = [Contestant(f"{flags} {more}", device) for more in ("", HOST)]
    for number in range(warm + pairs):
        for one in both if number % 2 else both[::-1]:
            one.step()
    for one in both:
        del one.seen.steps[:warm], one.seen.updates[:warm]
    return both[0].seen, both[1].seen, both[0].parameters


def report(beside: Seen, host: Seen, parameters: int, where: str) -> list[str]:
    """In words."""
    steps, updates = (
        statistics.median(b / a for a, b in zip(*pair, strict=True))
        for pair in ((beside.steps, host.steps), (beside.updates, host.updates))
    )
    update = statistics.median(host.updates)
    apart = max(abs(a - b) for a, b in zip(beside.losses, host.losses, strict=True))
    lines = [
        f"{parameters / 1e6:,.0f} M parameters in bf16 on {where}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {len(host.steps)} pairs of steps",
        f"step    {statistics.median(beside.steps) * 1e3:9.1f} ms without, "
        f"{statistics.median(host.steps) * 1e3:9.1f} ms with {HOST}: ratio {steps:.3f}",
        f"update  {statistics.median(beside.updates) * 1e3:9.1f} ms without, {update * 1e3:9.1f} ms with: "
        f"ratio {updates:.2f}; gradients come at {parameters * 4 / update / 1e9:.2f} GB/s",
        f"largest difference of a loss: {apart:.1e}",
    ]
    if beside.kept:
        lines.append(
            f"kept on the device {beside.kept / 2**30:.2f} GiB without, {host.kept / 2**30:.2f} GiB with"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Measure where there is a GPU, else on the CPU, and say which."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--flags", default="", help="more flags of the trainer, of both")
    asked = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    where = torch.cuda.get_device_name() if on_gpu else "a CPU (its own host: no link is measured)"
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    flags = f"{COMMON} {SIZES[device.type]} {asked.flags}"
    for line in report(*compare(flags, device, pairs=asked.pairs), where):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
