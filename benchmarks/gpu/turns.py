"""How: turns of some steps, one contestant after the other, and what is seen of one more step."""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.cases import Case
from benchmarks.gpu.contestants import Contestant, NotInstalled, Ours, Weights
from megatron_lite.data.batch import Batch

_MOST_KERNELS = 6


@dataclass
class Seen:
    """Of one contestant: seconds per step of every turn, first losses, memory, waits, kernels."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory_gib: float | None = None
    waits: int | None = None
    kernels: list[tuple[str, float]] = field(default_factory=list)


Found = dict[str, Seen | str]
"""Row -> what was seen of it, or why it is not there."""


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def release(device: torch.device) -> None:
    """Give freed memory back, so that another contestant can have it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_steps(who: Contestant, batches: Sequence[Batch], device: torch.device) -> Seen:
    """Compile and warm up on the first batches; their losses are compared between contestants."""
    seen = Seen(losses=[float(who.step(batch)) for batch in batches])
    wait(device)
    return seen


def turn(who: Contestant, seen: Seen, batches: Sequence[Batch], device: torch.device) -> None:
    """Time one step for each batch, with one wait at the end; one more goes before them."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    who.step(batches[-1])
    wait(device)
    began = time.perf_counter()
    for batch in batches:
        who.step(batch)
    wait(device)
    seen.seconds.append((time.perf_counter() - began) / len(batches))
    if on_gpu:
        seen.memory_gib = torch.cuda.max_memory_allocated() / 2**30


def look(who: Contestant, seen: Seen, batch: Batch, device: torch.device) -> None:
    """Count one step's waits for the device, and name the kernels that take most of its time."""
    if device.type != "cuda":
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            who.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    seen.waits = sum("synchroniz" in str(one.message) for one in caught)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        who.step(batch)
        wait(device)
    rows: list[Any] = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows) or 1.0
    seen.kernels = [(row.key, row.self_device_time_total / total) for row in rows[:_MOST_KERNELS]]


def measure(case: Case, device: torch.device, *, rounds: int, steps: int) -> Found:
    """Row -> what was seen of it, or why it is not there."""
    batches = case.batches(max(steps, 2))
    weights: Weights = {}
    found: Found = {}
    held: dict[str, Contestant] = {}

    def get(name: str) -> Contestant:
        nonlocal weights
        who = held.pop(name, None) or case.rows[name](case, weights, device)
        if isinstance(who, Ours) and not weights:
            weights = who.first_weights()
        return who

    def put(name: str, who: Contestant) -> None:
        if case.together:
            held[name] = who

    for number in range(rounds):
        for name in case.rows:
            if isinstance(found.get(name), str):
                continue
            try:
                who = get(name)
            except NotInstalled as missing:
                found[name] = f"not installed: {missing}"
                continue
            fresh = number == 0 or not case.together
            begun = first_steps(who, batches[:2], device) if fresh else None
            seen = found.setdefault(name, begun or Seen())
            assert isinstance(seen, Seen)
            turn(who, seen, batches[:steps], device)
            if number == rounds - 1:
                look(who, seen, batches[0], device)
            put(name, who)
            del who
            release(device)
            print(f"    round {number + 1}/{rounds}  {name}: {1e3 * seen.seconds[-1]:.1f} ms/step",
                  file=sys.stderr, flush=True)  # fmt: skip
    return found
