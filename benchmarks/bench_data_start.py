#!/usr/bin/env python3
"""How long a run waits for its data: first start, start from the cache, a thousand datasets.

python benchmarks/bench_data_start.py [--folder F] [--small]

The pairs are made here: real indices over .bin files that are holes.  megatron-core, where it is
installed, builds the same blend in the same run (extra `bench`); its time is the baseline.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.build import build_datasets
from megatron_lite.data.indexed import HEADER, MAGIC

ROOT = Path(__file__).resolve().parents[1]
SEQUENCE = 2048


def make_pair(prefix: Path, documents: int, seed: int) -> str:
    """An index of documents of 500 to 1,500 tokens; the tokens are a hole of zeros."""
    lengths = np.random.default_rng(seed).integers(500, 1501, documents).astype(np.int32)
    nbytes = lengths.astype(np.int64) * 2
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        file.write(lengths.tobytes())
        file.write((np.cumsum(nbytes) - nbytes).tobytes())
        file.write(np.arange(documents + 1, dtype=np.int64).tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(int(nbytes.sum()))
    return str(prefix)


def start(path: list[str], samples: int, cache: Path) -> None:
    """What a training run does before its first sample."""
    made = build_datasets(
        DataConfig(data_path=path, split="1"),
        seq_length=SEQUENCE,
        seed=1234,
        train_samples=samples,
        valid_samples=0,
        test_samples=0,
        vocab_size=50257,
        eod=50256,
        cache_folder=cache,
    )
    assert made.train is not None and len(made.train) >= samples


def start_megatron(prefixes: list[str], weights: list[float], samples: int, cache: Path) -> None:
    """The same blend by megatron-core."""
    builder = importlib.import_module("megatron.core.datasets.blended_megatron_dataset_builder")
    gpt = importlib.import_module("megatron.core.datasets.gpt_dataset")
    dist = importlib.import_module("torch.distributed")
    if not dist.is_initialized():  # it asks for its rank
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    class Tokenizer:
        eod, pad, vocab_size = 50256, 50258, 50257
        unique_identifiers = {"class": "benchmark"}

    config = gpt.GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQUENCE,
        blend=(prefixes, weights),
        split="1,0,0",
        path_to_cache=str(cache),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=Tokenizer(),
    )
    kind = builder.BlendedMegatronDatasetBuilder
    kind(gpt.GPTDataset, [samples, 0, 0], lambda: True, config).build()


def timed(what: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    what(*arguments)
    return time.perf_counter() - began


def say(name: str, seconds: float, target: float, baseline: float | None = None) -> None:
    """One line; the target is what we promise."""
    beside = "baseline skipped: megatron-core is not installed (extra bench)"
    if baseline is not None:
        beside = f"megatron-core {baseline:7.3f} s   {baseline / seconds:6.2f} x"
    print(f"{name:<58} {seconds:7.3f} s (target {target:g} s)   {beside}")


def two_large(folder: Path, scale: int) -> None:
    """A blend of two sets of a million documents for ten million samples."""
    prefixes = [make_pair(folder / name, 1_000_000 // scale, k) for k, name in enumerate("ab")]
    samples, weights = 10_000_000 // scale, [0.35, 0.65]
    path = [word for pair in zip(map(str, weights), prefixes, strict=True) for word in pair]
    os.sync()  # what was just made must not be written on the first start's account
    first = timed(start, path, samples, folder / "ours")
    again = min(timed(start, path, samples, folder / "ours") for _ in range(3))
    try:
        start_megatron([prefixes[0]] * 2, weights, 1000, folder / "warm")  # imports are not counted
        theirs: float | None = timed(start_megatron, prefixes, weights, samples, folder / "theirs")
        theirs_again: float | None = timed(
            start_megatron, prefixes, weights, samples, folder / "theirs"
        )
    except ImportError:
        theirs = theirs_again = None
    what = f"2 sets of {1_000_000 // scale:,} documents, {samples:,} samples"
    say(f"{what}, first", first, 2.0, theirs)
    say(f"{what}, cached", again, 0.3, theirs_again)
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, str(ROOT / "tools" / "dataset_stats.py"), prefixes[0]],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - began
    print(
        f"{'tools/dataset_stats.py of one of them, Python started':<58} {seconds:7.3f} s (target 1 s)"
    )


def thousand(folder: Path, scale: int) -> None:
    """A thousand datasets, opened, checked and blended; the handles that stay open."""
    count = 1000 // min(scale, 10)
    prefixes = [make_pair(folder / f"d{k}", 10_000, k) for k in range(count)]
    path = [word for k, prefix in enumerate(prefixes) for word in (str(k % 7 + 1), prefix)]
    os.sync()
    first = timed(start, path, 1_000_000 // scale, folder / "many")
    again = timed(start, path, 1_000_000 // scale, folder / "many")
    what = f"{count:,} datasets of 10,000 documents"
    print(f"{what + ', opened and blended, first':<58} {first:7.3f} s (target 5 s)")
    print(f"{what + ', cached':<58} {again:7.3f} s (target 5 s)")


def main(argv: Sequence[str] | None = None) -> int:
    """Print every row."""
    parser = argparse.ArgumentParser(description="start-up of the data side")
    parser.add_argument("--folder", help="where the files are made; a temporary folder by default")
    parser.add_argument("--small", action="store_true", help="a hundredth of the work")
    asked = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="bench-data-", dir=asked.folder))
    try:
        two_large(folder, 100 if asked.small else 1)
        thousand(folder, 100 if asked.small else 1)
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
