"""`make bench`: a small GPT trained by us and by a plain PyTorch loop, alternating in one process.

    4 layers, 256 wide, 4 heads, sequence 256, vocabulary 8192, micro batch 8, dropout 0

Prints the median ratio of tokens/s ours/plain over alternating pairs, where our time goes, and
memory beside the formula.  Threads: as many as the machine has, unless OMP_NUM_THREADS says.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.plain_gpt import PlainGPT, PlainTrainer
from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.config.flags.parser import parse
from megatron_lite.data.batch import Batch
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train import step as step_module
from megatron_lite.train.assemble import assemble
from megatron_lite.train.run import Run
from megatron_lite.train.step import train_step

LAYERS, HIDDEN, HEADS, SEQUENCE, VOCABULARY, MICRO = 4, 256, 4, 256, 8192, 8


def our_run(*extra: str) -> Run:
    """Our trainer of the benchmark's model in this process."""
    flags = (
        f"--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads {HEADS} "
        f"--seq-length {SEQUENCE} --vocab-size {VOCABULARY} --mock-data --hidden-dropout 0 "
        f"--attention-dropout 0 --micro-batch-size {MICRO} --train-iters 1000 --lr 1e-4 "
        "--weight-decay 0.1 --tokenizer-type NullTokenizer"
    )
    config = parse([*flags.split(), *extra]).config
    return assemble(config, draw_up(config, 1), ParallelContext.serial())


def batch_of(seed: int) -> Batch:
    """Random tokens: int64 [micro, s + 1]."""
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (MICRO, SEQUENCE + 1))
    return Batch(tokens, np.arange(MICRO), np.ones((MICRO, SEQUENCE), dtype=np.float32))


def seconds(work: Callable[[], object], repeat: int) -> float:
    """Mean wall seconds of `work` over some repetitions."""
    began = time.perf_counter()
    for _ in range(repeat):
        work()
    return (time.perf_counter() - began) / repeat


def compare(run: Run, plain: PlainTrainer, pairs: int) -> list[tuple[float, float]]:
    """(plain, ours) seconds per step of every pair."""
    # fresh tokens each step: a memorised batch has vanishing gradients, whose denormals are slow
    mine, other = (itertools.cycle([batch_of(seed) for seed in range(32)]) for _ in range(2))

    def ours() -> None:
        train_step(run, [next(mine)], lr=1e-5, weight_decay=0.1).loss.item()

    def theirs() -> None:
        plain.step(torch.from_numpy(next(other).tokens)).item()

    for warm_up in (ours, theirs):
        seconds(warm_up, 2)
    return [(seconds(theirs, 2), seconds(ours, 2)) for _ in range(pairs)]


def report(name: str, times: list[tuple[float, float]]) -> float:
    """Print and return the median ratio of speeds ours/plain."""
    ratios = sorted(plain / ours for plain, ours in times)
    tokens = MICRO * SEQUENCE
    plain, ours = (statistics.median(column) for column in zip(*times, strict=True))
    middle = statistics.median(ratios)
    quartiles = f"{ratios[len(ratios) // 4]:.3f}-{ratios[-1 - len(ratios) // 4]:.3f}"
    print(
        f"ratio ours/plain {middle:.3f}   {name:22s} ours {tokens / ours:8.0f} tokens/s, plain fp32 "
        f"{tokens / plain:8.0f} tokens/s, quartiles {quartiles}, {len(times)} pairs"
    )
    return middle


def breakdown(run: Run) -> None:
    """Where one step of ours goes, from torch's profiler, and its biggest operators."""
    batch = batch_of(0)
    spans = {"data": 0.0, "forward": 0.0, "backward": 0.0, "optimizer": 0.0}
    stage = next(iter(run.pipeline.stages.values()))
    forward, backward, step = type(stage).forward, type(stage).backward, run.engine.apply

    def timed(name: str, work: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            began = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                spans[name] += time.perf_counter() - began

        return call

    repeat = 5
    kind = type(stage)
    feed = step_module.to_device
    step_module.to_device = timed("data", feed)  # type: ignore[assignment]
    kind.forward, kind.backward = timed("forward", forward), timed("backward", backward)  # type: ignore[method-assign, assignment]
    run.engine.apply = timed("optimizer", step)  # type: ignore[method-assign, assignment]
    try:
        total = seconds(lambda: train_step(run, [batch], lr=1e-4, weight_decay=0.1), repeat)
    finally:
        step_module.to_device = feed
        kind.forward, kind.backward = forward, backward  # type: ignore[method-assign]
        run.engine.apply = step  # type: ignore[method-assign]
    parts = {name: value / repeat for name, value in spans.items()}
    parts["other"] = total - sum(parts.values())
    shares = ", ".join(f"{n} {1e3 * t:.1f} ms ({t / total:.1%})" for n, t in parts.items())
    print(f"our step {1e3 * total:.1f} ms: {shares}")
    with torch.profiler.profile() as profile:
        train_step(run, [batch], lr=1e-4, weight_decay=0.1)
    table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12)
    print("\n".join(line[:110] for line in table.splitlines()[:18]))


def memory(run: Run) -> None:
    """Bytes our engine holds beside the formula 4 (weights) + 4 (gradients) + 8 (moments)."""
    own = [local.parameter for local in run.parameters]
    parameters = sum(p.numel() for p in own)
    held: dict[int, int] = {}
    states = [s.data for s in run.engine.state(owned=False)]
    gradients = [gradient for _, gradient in run.engine.accumulators()]
    for tensor in [*own, *gradients, *states]:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    extra = sum(p.grad.nbytes for p in own if p.grad is not None)
    fp32 = run.context.precision.name == "fp32"
    formula = 16 if fp32 else 18
    print(
        f"memory: {sum(held.values()) / parameters:.2f} bytes per parameter held, formula {formula} "
        f"({'4 + 4 + 8' if fp32 else '2 + 4 + 4 + 8'}); .grad left after the step: {extra} bytes; "
        f"{parameters:,} parameters"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=11)
    asked = parser.parse_args()
    torch.manual_seed(0)
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0) or os.cpu_count() or 1
    torch.set_num_threads(threads)
    print(f"{platform.machine()}, {threads} threads, torch {torch.__version__}")
    model = PlainGPT(LAYERS, HIDDEN, HEADS, SEQUENCE, VOCABULARY)
    plain = PlainTrainer(model, lr=1e-5, device=torch.device("cpu"))
    run = our_run()
    report("fp32", compare(run, plain, asked.pairs))
    breakdown(run)
    memory(run)
    low = our_run("--bf16")
    report("bf16 against plain fp32", compare(low, plain, asked.pairs))
    breakdown(low)
    memory(low)
    return 0


if __name__ == "__main__":
    sys.exit(main())
