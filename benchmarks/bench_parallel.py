"""`make bench-parallel`: our tp2, pp2, dp2 beside PyTorch's own, alternating in the same two processes.

    4 layers, 256 wide, 4 heads, sequence 128, vocabulary 8192, untied, dropout 0, fp32
    16 sequences a step, 2 processes with one thread each, gloo

Every contestant has the same weights at the start and sees the same batches, so their losses are
equal; the run ends with exit code 1 where they are not.  A round lets each take some steps, in turn
forwards and backwards through the list; a ratio is that of two contestants' times in one round.
Printed: the median ratio over the rounds, its quartiles, tokens/s, and the same ratio of the CPU time
of both processes, which other work on the machine hardly changes (and which does not see waiting).
With --memory each contestant has two processes of its own instead, and what they hold is printed.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import functools
import gc
import io
import os
import platform
import pstats
import socket
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import torch_parallel
from benchmarks.plain_gpt import PlainGPT
from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.config.flags.parser import parse
from megatron_lite.data.batch import Batch
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import weight_slices
from megatron_lite.train.assemble import assemble
from megatron_lite.train.run import Run
from megatron_lite.train.step import train_step

LAYERS, HIDDEN, HEADS, SEQUENCE, VOCABULARY, SAMPLES, RANKS = 4, 256, 4, 128, 8192, 16, 2
MICRO_BATCHES = 8
"""Of the pipelines; the others take their part of the batch at once."""

Step = Callable[[Tensor], Tensor]


class Time(NamedTuple):
    """Seconds per step: of the slowest rank by the clock, of all ranks' processors."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Pair:
    """Ours beside a baseline; goal: least median ratio of speeds asked for."""

    ours: str
    baseline: str
    goal: float | None


PAIRS = [
    Pair("dp2", "DDP", 0.95),
    Pair("dp2 zero", "DDP", None),
    Pair("dp2 zero", "FSDP2", 1.0),
    Pair("dp2 zero overlap", "FSDP2", None),
    Pair("dp2 zero 2", "FSDP2", 1.0),
    Pair("dp2 zero 3", "FSDP2 reshard", 1.0),
    Pair("tp2", "DTensor", 1.0),
    Pair("tp2 sp", "DTensor sp", 1.0),
    Pair("pp2", "pipelining 1F1B", 1.0),
    Pair("pp2 zb-v", "pipelining 1F1B", None),
]

SMALL = SAMPLES // MICRO_BATCHES
BY_BLOCK = "--ddp-bucket-size 800000 --overlap-param-gather"
"""Buckets as large as a block, which FSDP2 takes by itself."""

OURS: dict[str, tuple[int, str]] = {
    "dp2": (8, ""),
    "dp2 zero": (8, "--use-distributed-optimizer"),
    "dp2 zero overlap": (8, f"--use-distributed-optimizer {BY_BLOCK}"),
    "dp2 zero 2": (8, f"--zero-stage 2 {BY_BLOCK}"),
    "dp2 zero 3": (8, "--zero-stage 3"),
    "tp2": (16, "--tensor-model-parallel-size 2"),
    "tp2 sp": (16, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (SMALL, "--pipeline-model-parallel-size 2"),
    "pp2 zb-v": (SMALL, "--pipeline-model-parallel-size 2 --pipeline-schedule zb-v"),
}
"""Name -> sequences of a micro batch, and the flags."""


def assembled(micro: int, flags: str, rank: int, ranks: int) -> Run:
    """Our trainer of the benchmark's model; collective over the ranks."""
    common = (
        f"--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads {HEADS} --seq-length {SEQUENCE} "
        f"--vocab-size {VOCABULARY} --untie-embeddings-and-output-weights --mock-data --hidden-dropout 0 "
        f"--attention-dropout 0 --global-batch-size {SAMPLES} --train-iters 1000 --lr 1e-4 "
        "--weight-decay 0.1 --tokenizer-type NullTokenizer --make-vocab-size-divisible-by 1 "
        f"--micro-batch-size {micro}"
    )
    config = parse([*common.split(), *flags.split()]).config
    blueprint = draw_up(config, ranks)
    if ranks == 1:
        return assemble(config, blueprint, ParallelContext.serial())
    ctx = ParallelContext.from_grid(blueprint.grid, rank, torch.device("cpu"))
    return assemble(config, blueprint, ctx)


def our_step(micro: int, flags: str, rank: int) -> Step:
    """One training step on the whole batch's tokens [b, s + 1]."""
    run = assembled(micro, flags, rank, RANKS)
    dp = run.ctx.dp
    mask = np.ones((micro, SEQUENCE), dtype=np.float32)

    def step(tokens: Tensor) -> Tensor:
        mine = tokens.numpy()[dp.rank :: dp.size]
        batches = [
            Batch(mine[i : i + micro], np.arange(i, i + micro), mask)
            for i in range(0, len(mine), micro)
        ]
        return (
            train_step(run, batches, lr=torch_parallel.LR, weight_decay=torch_parallel.DECAY).loss
            / RANKS
        )

    return step


def plain_model(ours: Run, parts: int = 1) -> PlainGPT:
    """The plain model with our weights; parts: tp ranks, whose rows of q, k and v lie together."""
    weights = {s.name: s.data for s in weight_slices(ours.parameters, ours.ctx, owned=True)}
    of = ours.blueprint.model
    model = PlainGPT(
        of.num_layers, of.hidden_size, of.num_attention_heads, of.seq_length, of.vocab_size,
        tied=False,
    )  # fmt: skip
    place = {
        "embedding.tokens": model.tokens, "embedding.positions": model.positions,
        "final_norm": model.norm, "head": model.head,
    }  # fmt: skip
    for i, block in enumerate(model.blocks):
        place |= {
            f"blocks.{i}.{ours}": getattr(block, theirs)
            for ours, theirs in (
                ("attention_norm", "norm1"), ("attention.output", "out"), ("mlp_norm", "norm2"),
                ("mlp.up", "up"), ("mlp.down", "down"),
            )
        }  # fmt: skip
    with torch.no_grad():
        for name, module in place.items():
            for leaf, parameter in module.named_parameters():
                parameter.copy_(weights.pop(f"{name}.{leaf}"))
        for i, block in enumerate(model.blocks):
            for leaf, parameter in block.qkv.named_parameters():
                three = [weights.pop(f"blocks.{i}.attention.{one}.{leaf}") for one in "qkv"]
                rows = [one.chunk(parts)[part] for part in range(parts) for one in three]
                parameter.copy_(torch.cat(rows))
    assert not weights, f"not copied: {list(weights)}"
    return model


@functools.cache
def serial() -> Run:
    """Whose weights all begin with."""
    return assembled(SAMPLES, "", 0, 1)


def contestants(rank: int, names: Collection[str]) -> dict[str, Step]:
    """All of them, ready to step; collective over the ranks."""
    mesh = init_device_mesh("cpu", (RANKS,))
    makers: dict[str, Callable[[], Step]] = {
        "DDP": lambda: torch_parallel.data_parallel(plain_model(serial()), rank, RANKS),
        "FSDP2": lambda: torch_parallel.fully_sharded(
            plain_model(serial()), rank, RANKS, mesh, reshard=False
        ),
        "FSDP2 reshard": lambda: torch_parallel.fully_sharded(
            plain_model(serial()), rank, RANKS, mesh, reshard=True
        ),
        "DTensor": lambda: torch_parallel.tensor_parallel(
            plain_model(serial(), RANKS), mesh, split=False
        ),
        "DTensor sp": lambda: torch_parallel.tensor_parallel(
            plain_model(serial(), RANKS), mesh, split=True
        ),
        "pipelining 1F1B": lambda: torch_parallel.pipelined(
            plain_model(serial()), rank, RANKS, MICRO_BATCHES, dist.group.WORLD
        ),
    }
    makers |= {name: (lambda asked=asked: our_step(*asked, rank)) for name, asked in OURS.items()}
    return {name: make() for name, make in makers.items() if name in names}


def batch(number: int) -> Tensor:
    """Fresh random tokens int64 [b, s + 1]: a memorised batch has denormal gradients, which are slow."""
    made = np.random.default_rng(number).integers(0, VOCABULARY, (SAMPLES, SEQUENCE + 1))
    return torch.from_numpy(made)


def first_losses(steps: dict[str, Step], count: int) -> dict[str, list[float]]:
    """The global mean loss of the first steps, which also warm up."""
    found: dict[str, list[float]] = {}
    for name, step in steps.items():
        found[name] = []
        for number in range(count):
            loss = step(batch(number)).detach().clone().double()
            dist.all_reduce(loss)
            found[name].append(loss.item())
    return found


def timed(step: Step, numbers: range) -> Time:
    """The mean over some steps.  Collective."""
    batches = [batch(number) for number in numbers]
    dist.barrier()
    began, cpu = time.perf_counter(), time.process_time()
    for tokens in batches:
        step(tokens).item()
    wall = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    used = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
    dist.all_reduce(wall, op=dist.ReduceOp.MAX)
    dist.all_reduce(used)
    return Time(wall.item() / len(numbers), used.item() / len(numbers))


def measure(steps: dict[str, Step], rounds: int, length: int) -> dict[str, list[Time]]:
    """The time of every contestant in every round."""
    found: dict[str, list[Time]] = {name: [] for name in steps}
    for number in range(rounds):
        order = list(steps) if number % 2 == 0 else list(reversed(steps))
        for name in order:
            first = 1000 + number * length
            found[name].append(timed(steps[name], range(first, first + length)))
    return found


def report(pairs: list[Pair], seconds: dict[str, list[Time]]) -> None:
    """The table, as Markdown."""
    print(
        "\n| ours | beside | ratio of speeds | quartiles | goal | ours, tokens/s | beside, tokens/s | "
        "ratio by CPU time |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for pair in pairs:
        mine, theirs = seconds[pair.ours], seconds[pair.baseline]
        ratios = [b.wall / a.wall for a, b in zip(mine, theirs, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        middle = statistics.median(ratios)
        work = statistics.median(b.cpu / a.cpu for a, b in zip(mine, theirs, strict=True))
        asked = "-"
        if pair.goal is not None:
            asked = f"{pair.goal:.2f} {'met' if middle >= pair.goal else 'MISSED'}"
        speeds = [
            SAMPLES * SEQUENCE / statistics.median(time.wall for time in times)
            for times in (mine, theirs)
        ]
        print(
            f"| {pair.ours} | {pair.baseline} | {middle:.3f} | {low:.3f}-{high:.3f} | {asked} | "
            f"{speeds[0]:.0f} | {speeds[1]:.0f} | {work:.3f} |"
        )


def join(rank: int, port: int) -> None:
    """Make this process one of the two."""
    warnings.filterwarnings("ignore")  # torch's, about its own older names
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, RANKS, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)


def chosen(only: Collection[str] | None) -> list[Pair]:
    """The pairs with one of these names; all by default."""
    return [p for p in PAIRS if not only or any(o in (p.ours, p.baseline) for o in only)]


def resident(kind: str) -> float:
    """MB of this process: VmRSS now, VmHWM the most since forget_peak()."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)
    )
    return int(line.split()[1]) / 1e3


def settled() -> float:
    """MB that are in use, free memory given back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def weigh(rank: int, port: int, name: str) -> None:
    """What one contestant holds between steps and at most in a step, beyond an empty process."""
    join(rank, port)
    contestants(rank, [name])[name](batch(0))  # loads what is loaded once
    empty = settled()
    step = contestants(rank, [name])[name]
    for number in range(3):
        step(batch(number)).item()
    held = settled() - empty
    Path("/proc/self/clear_refs").write_text("5")
    step(batch(3)).item()
    both = torch.tensor([held, resident("VmHWM") - empty])
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    if rank == 0:
        print(f"| {name} | {both[0]:.0f} | {both[1]:.0f} |", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def work(rank: int, port: int, asked: argparse.Namespace) -> None:
    """One of the two processes."""
    join(rank, port)
    pairs = chosen(asked.only)
    steps = contestants(rank, {name for p in pairs for name in (p.ours, p.baseline)})
    losses = first_losses(steps, 3)
    reference = next(iter(losses.values()))
    apart = max(
        abs(a - b) / b for found in losses.values() for a, b in zip(found, reference, strict=True)
    )
    if rank == 0:
        for name, found in losses.items():
            print(f"first losses of {name:18s} {' '.join(f'{loss:.6f}' for loss in found)}")
        print(f"largest relative difference {apart:.1e}")
    if apart > 1e-5:
        raise SystemExit("the contestants do not train the same model")
    if asked.profile:
        profile(steps[asked.profile], rank, asked.steps)
        return
    seconds = measure(steps, asked.rounds, asked.steps)
    if rank == 0:
        report(pairs, seconds)
    dist.barrier()
    dist.destroy_process_group()


def profile(step: Step, rank: int, count: int) -> None:
    """Where a contestant's steps go: operators by torch's profiler, then Python functions."""
    numbers = range(500, 500 + count)
    with torch.profiler.profile() as operators:
        timed(step, numbers)
    python = cProfile.Profile()
    python.enable()
    timed(step, numbers)
    python.disable()
    if rank == 0:
        print(operators.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
        text = io.StringIO()
        pstats.Stats(python, stream=text).sort_stats("tottime").print_stats(30)
        print(text.getvalue())


def main() -> int:
    """Start the processes; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="steps of each contestant in a round")
    parser.add_argument("--only", nargs="*", help="pairs with one of these names")
    parser.add_argument("--memory", action="store_true", help="what each holds, not how fast it is")
    parser.add_argument("--profile", help="profile this contestant instead")
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    print(
        f"{platform.machine()}, {os.cpu_count()} processors, {RANKS} processes of 1 thread, torch "
        f"{torch.__version__}, Python {platform.python_version()}, load before {load:.1f}\n"
        f"{LAYERS} layers, width {HIDDEN}, {HEADS} heads, sequence {SEQUENCE}, vocabulary {VOCABULARY}, "
        f"{SAMPLES} sequences a step, {asked.rounds} rounds of {asked.steps} steps",
        flush=True,
    )
    if asked.memory:
        # a large tensor has pages of its own, which go back to the system when it is freed
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        print(
            "\n| contestant | MB between steps | MB at most in a step |\n|---|---|---|", flush=True
        )
        for name in dict.fromkeys(n for p in chosen(asked.only) for n in (p.ours, p.baseline)):
            torch.multiprocessing.spawn(weigh, (free_port(), name), nprocs=RANKS)
    else:
        torch.multiprocessing.spawn(work, (free_port(), asked), nprocs=RANKS)
    print(f"load after {os.getloadavg()[0]:.1f}")
    return 0


def free_port() -> int:
    """A port of this machine that nobody uses right now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
