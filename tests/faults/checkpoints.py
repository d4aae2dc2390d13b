"""Small checkpoints of a seed, saved in both ways and loaded again."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.saver import Background
from megatron_lite.checkpoint.snapshot import Origin, Snapshot
from megatron_lite.checkpoint.store import Keep, Saved, Store
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import NamedSlice
from megatron_lite.storage.disk import Disk

SHAPES = {"a.weight": (4, 3), "b.bias": (5,), "c.weight": (2, 2, 2)}


def state(seed: int, prefix: str = "") -> list[NamedSlice]:
    random = torch.Generator().manual_seed(seed)
    return [
        NamedSlice(prefix + name, shape, (0,) * len(shape), torch.randn(shape, generator=random))
        for name, shape in SHAPES.items()
    ]


def save(
    folder: Path, seed: int, iteration: int, disk: Disk, keep_last: int | None = None
) -> Saved:
    store = Store(folder, ParallelContext.serial(), disk)
    return store.save(snapshot(store, seed, iteration), Keep(keep_last))


def save_beside(
    folder: Path, seed: int, iteration: int, disk: Disk, keep_last: int | None = None
) -> Saved:
    """The same by the thread of --async-save."""
    store = Store(folder, ParallelContext.serial(), disk)
    saver = Background.over(store, Keep(keep_last), idle=lambda: None)
    saver.save(snapshot(store, seed, iteration))
    saver.wait()
    saved = saver.finished()
    assert saved is not None
    return saved


def snapshot(store: Store, seed: int, iteration: int) -> Snapshot:
    return store.snapshot(
        iteration,
        weights=state(seed),
        optimizer=state(seed + 100, "exp_avg."),
        progress=Progress(step=iteration, samples=seed + 9, lr_samples=seed + 9),
        config={"seed": seed},
        origin=Origin(tokenizer_files={"vocab.json": b"{}"}),
    )


def loaded(folder: Path) -> int:
    """The seed of the checkpoint that loads, all of which must be of that seed, bit by bit."""
    store = Store(folder, ParallelContext.serial())
    manifest, _ = store.newest_intact()
    assert manifest is not None
    seed = manifest.config["seed"]
    assert manifest.progress.samples == seed + 9
    expected = [*state(seed), *state(seed + 100, "exp_avg.")]
    found = [
        NamedSlice(s.name, s.shape, s.offset, torch.full_like(s.data, torch.nan)) for s in expected
    ]
    store.load(manifest, found)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.data, theirs.data), (ours.name, seed)
    return seed


CASES = {"the next iteration": (2, None), "the same iteration": (1, None), "keep last": (2, 1)}
OLD, NEW = 1, 2
