"""`make bench-gpu`: gpt2-124m in bf16 on one GPU, with and without torch.compile.

    batch 64 x 1024 tokens per step (--micro-batch-size 64), vocabulary 50257, dropout 0

Prints tokens/s, TFLOP/s, MFU, memory and a kernel breakdown; the ratio is against our own eager run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.config.flags.parser import parse
from megatron_lite.data.batch import Batch
from megatron_lite.layers.attention import choose_attention
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.assemble import assemble
from megatron_lite.train.measuring.device import device_peak
from megatron_lite.train.run import Run
from megatron_lite.train.step import train_step

SEQUENCE, VOCABULARY = 1024, 50257


def build(micro: int, *extra: str) -> Run:
    """Our trainer of gpt2-124m on the first GPU."""
    flags = (
        f"--preset gpt2-124m --seq-length {SEQUENCE} --vocab-size {VOCABULARY} --mock-data "
        f"--tokenizer-type NullTokenizer --hidden-dropout 0 --attention-dropout 0 --bf16 "
        f"--micro-batch-size {micro} --global-batch-size {micro} --train-iters 1000 --lr 6e-4"
    )
    config = parse([*flags.split(), *extra]).config
    return assemble(config, draw_up(config, 1), ParallelContext.serial("cuda"))


def batch_of(micro: int, seed: int) -> Batch:
    """Random tokens: int64 [micro, s + 1]."""
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (micro, SEQUENCE + 1))
    return Batch(tokens, np.arange(micro), np.ones((micro, SEQUENCE), dtype=np.float32))


def measure(name: str, run: Run, micro: int, steps: int) -> float:
    """Print the rates of some steps after warm-up; returns tokens per second (median)."""
    batches = [batch_of(micro, seed) for seed in range(4)]
    torch.cuda.reset_peak_memory_stats()

    def step(index: int) -> None:
        train_step(run, [batches[index % 4]], lr=1e-5, weight_decay=0.1)

    for index in range(5):
        step(index)
    torch.cuda.synchronize()
    times = []
    for index in range(steps):
        began = time.perf_counter()
        step(index)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    rate = micro * SEQUENCE / statistics.median(times)
    tflops = rate * run.blueprint.flops_per_token_full / 1e12
    peak = device_peak(run.ctx.device)
    mfu = f"{tflops / peak:.1%}" if peak else "-"
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(f"{name:14s} {rate:10.0f} tokens/s  {tflops:6.1f} TFLOP/s (full attention)  MFU {mfu}  "
          f"{1e3 * statistics.median(times):.1f} ms/step  {memory:.1f} GiB")  # fmt: skip
    return rate


def kernels(run: Run, micro: int) -> None:
    """The kernels of one step that take the most time."""
    batch = batch_of(micro, 0)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        train_step(run, [batch], lr=1e-5, weight_decay=0.1)
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda r: -r.self_device_time_total)[:14]
    total = sum(r.self_device_time_total for r in profile.key_averages()) or 1
    for row in rows:
        print(f"    {row.self_device_time_total / total:6.1%}  {row.key[:90]}")


def main() -> int:
    """Eager, then compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--micro-batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu: no GPU here; nothing was measured")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    rates = {}
    for name, extra in (("eager", ()), ("torch.compile", ("--torch-compile",))):
        run = build(asked.micro_batch_size, *extra)
        if name == "eager":
            print(choose_attention(run.context, training=True).why)
        rates[name] = measure(name, run, asked.micro_batch_size, asked.steps)
        kernels(run, asked.micro_batch_size)
        del run
        torch.cuda.empty_cache()
    print(f"ratio torch.compile/eager {rates['torch.compile'] / rates['eager']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
