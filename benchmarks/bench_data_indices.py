#!/usr/bin/env python3
"""Index arrays beside megatron-core's own compiled helper, in the same run on the same arrays.

python benchmarks/bench_data_indices.py [--repeats 3] [--small]

Every row is ours / theirs; what megatron-core 0.16.1 has compiled is the baseline (package index,
extra `bench`).  Without it the rows say so and only our seconds are printed.
"""

from __future__ import annotations

import argparse
import importlib
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_lite.data.indices import COMPILED, blend_index, sample_index, shuffled

BASELINE = "megatron-core 0.16.1 helpers_cpp"
Arrays = tuple[np.ndarray[Any, Any], ...]


def baseline() -> ModuleType | None:
    """megatron-core's compiled helper; None where it is not installed."""
    try:
        return importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError:
        return None


def timed(run: Callable[[], Arrays]) -> tuple[float, Arrays]:
    """Seconds of one run, and what it gave."""
    began = time.perf_counter()
    arrays = run()
    return time.perf_counter() - began, arrays


def row(name: str, ours: Callable[[], Arrays], theirs: Callable[[], Arrays] | None,
        repeats: int, items: int) -> float | None:  # fmt: skip
    """Print one line; returns how many times faster ours is, having compared the arrays."""
    pairs = []
    for _ in range(repeats):  # in turn, so that a busy machine is as bad for one as for the other
        mine, found = timed(ours)
        other, expected = timed(theirs) if theirs is not None else (math.inf, found)
        pairs.append((mine, other))
    mine, other = (min(seconds) for seconds in zip(*pairs, strict=True))
    line = f"{name:<42} ours {mine:7.3f} s ({mine / items * 1e9:5.1f} ns each)"
    if theirs is None:
        print(f"{line}   baseline skipped: megatron-core is not installed (extra bench)")
        return None
    equal = all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    print(f"{line}   baseline {other:7.3f} s   {other / mine:5.2f} x   arrays equal: {equal}")
    if not equal:
        raise SystemExit(f"{name}: the arrays differ from the baseline's")
    return other / mine


def samples(helper: ModuleType | None, documents: int, repeats: int, wide: bool) -> None:
    """Sample index of one shuffled epoch, 1,000 tokens per document on average, sequence 2048."""
    random = np.random.default_rng(0)
    sizes = random.integers(1, 2000, documents, dtype=np.int32)
    order = random.permutation(documents).astype(np.int32)
    tokens = int(sizes.sum(dtype=np.int64))
    count = (tokens - 1) // 2048
    width = "int64" if wide else "int32"
    ours: Callable[[], Arrays] = lambda: (sample_index(sizes, order, 2048, count),)  # noqa: E731
    if wide and COMPILED is not None:
        ours = lambda: (COMPILED.sample_index_int64(sizes, order, 2048, count),)  # noqa: E731
    theirs: Callable[[], Arrays] | None = None
    if helper is not None:
        build = getattr(helper, f"build_sample_idx_{width}")
        theirs = lambda: (build(sizes, order, 2048, 1, tokens, True, 1),)  # noqa: E731
    row(f"sample index, {documents:,} documents, {width}", ours, theirs, repeats, documents)


def blending(helper: ModuleType | None, size: int, datasets: int, repeats: int) -> None:
    """Greedy blending with weights between 1 and 10."""
    weights = np.random.default_rng(datasets).uniform(1, 10, datasets)
    shares = weights / weights.sum()

    def ours() -> Arrays:
        index = blend_index(shares, size)
        return index.dataset, index.sample

    def run_theirs() -> Arrays:
        dataset, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
        assert helper is not None
        helper.build_blending_indices(dataset, sample, shares.tolist(), datasets, size, False)
        return dataset, sample

    theirs = None if helper is None else run_theirs
    row(f"blending, {size:,} samples, {datasets} datasets", ours, theirs, repeats, size)


def exhaustive(helper: ModuleType | None, size: int, datasets: int, repeats: int) -> None:
    """Blending until every dataset is used up."""
    weights = np.random.default_rng(datasets).uniform(1, 10, datasets)
    counts = (weights / weights.sum() * size).astype(np.int64)
    total = int(counts.sum())

    def ours() -> Arrays:
        index = blend_index(counts / float(total), total, counts)
        return index.dataset, index.sample

    def run_theirs() -> Arrays:
        dataset, sample = np.zeros(total, np.int16), np.zeros(total, np.int64)
        assert helper is not None
        helper.build_exhaustive_blending_indices(dataset, sample, counts.tolist(), datasets)
        return dataset, sample

    theirs = None if helper is None else run_theirs
    row(f"exhaustive, {total:,} samples, {datasets} datasets", ours, theirs, repeats, total)


def twin(size: int, datasets: int, repeats: int) -> None:
    """numpy's blending beside one step at a time, of which a twentieth is measured."""
    weights = np.random.default_rng(datasets).uniform(1, 10, datasets)
    shares = weights / weights.sum()
    few = max(size // 20, 1)

    def one_by_one() -> Arrays:
        taken, behind = np.zeros(datasets), np.empty(datasets)
        chosen = np.empty(few, np.int16)
        for step in range(few):
            np.multiply(shares, max(float(step), 1.0), out=behind)
            behind -= taken
            chosen[step] = behind.argmax()
            taken[chosen[step]] += 1.0
        return (chosen,)

    pairs = [(timed(lambda: (blend_index(shares, size, helpers=None).dataset,)), timed(one_by_one))
             for _ in range(repeats)]  # fmt: skip
    equal = all(np.array_equal(ours[1][0][:few], slow[1][0]) for ours, slow in pairs)
    mine = min(ours[0] for ours, _ in pairs) / size
    other = min(slow[0] for _, slow in pairs) / few
    name = f"numpy twin, {size:,} samples, {datasets} datasets"
    print(f"{name:<42} ours {mine * size:7.3f} s ({mine * 1e9:5.1f} ns each)   one at a time "
          f"{other * size:7.3f} s   {other / mine:5.1f} x   arrays equal: {equal}")  # fmt: skip
    if not equal:
        raise SystemExit(f"{name}: the arrays differ")


def shuffling(size: int, repeats: int) -> None:
    """numpy's RandomState.shuffle is the baseline."""

    def ours() -> Arrays:
        return (shuffled(np.arange(size, dtype=np.int32), np.random.RandomState(1)),)

    def theirs() -> Arrays:
        values = np.arange(size, dtype=np.int32)
        np.random.RandomState(1).shuffle(values)
        return (values,)

    row(f"shuffle, {size:,} numbers (baseline: numpy)", ours, theirs, repeats, size)


def main(argv: Sequence[str] | None = None) -> int:
    """Print every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a hundredth of the work")
    asked = parser.parse_args(argv)
    scale = 100 if asked.small else 1
    helper = baseline()
    print(f"baseline: {BASELINE if helper is not None else 'none'}; best of {asked.repeats}; "
          f"numpy {np.__version__}, Python {platform.python_version()}, {platform.machine()}")  # fmt: skip
    if COMPILED is None:
        print("the C++ helpers are not built: ours is numpy (pip install -e . builds them)")
        scale *= 100
    for wide in (False, True):
        samples(helper, 10_000_000 // scale, asked.repeats, wide)
    for datasets in (2, 10, 100):
        blending(helper, 20_000_000 // scale, datasets, asked.repeats)
    exhaustive(helper, 20_000_000 // scale, 10, asked.repeats)
    for datasets in (2, 10, 100):
        twin(1_000_000 // scale * (100 if COMPILED is None else 1), datasets, asked.repeats)
    shuffling(20_000_000 // scale, asked.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
