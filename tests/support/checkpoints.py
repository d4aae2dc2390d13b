"""Runs of any layout that are saved, loaded at another and saved again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.store import Store
from megatron_lite.checkpoint.tensor_file import TORCH_DTYPES
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import NamedSlice
from megatron_lite.train.assemble import assemble
from megatron_lite.train.resume import fill_run
from megatron_lite.train.run import Run
from megatron_lite.train.step import train_step
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

Changes = dict[str, Any]


def assembled(rank: int, ranks: int, changes: Changes) -> tuple[RunConfig, Blueprint, Run]:
    """(config, blueprint, run) of a rank."""
    config = tiny_config(**changes)
    blueprint = draw(config, ranks)
    return config, blueprint, assemble(config, blueprint, context(blueprint, rank))


def train(config: RunConfig, blueprint: Blueprint, run: Run, steps: int) -> list[float]:
    """Losses of the steps that follow."""
    losses = []
    for _ in range(steps):
        batches = make_batches(config, blueprint, run.ctx.dp.rank, run.progress.step)
        result = train_step(run, batches, lr=1e-2, weight_decay=0.1)
        run.progress.step += 1
        losses.append(result.loss.item())
    return losses


def save(run: Run, folder: Path, progress: Progress) -> None:
    """All that the engine holds."""
    store = Store(folder, run.ctx)
    store.save(
        store.snapshot(
            progress.step,
            weights=run.engine.weights(owned=True),
            optimizer=run.engine.state(owned=True),
            progress=progress,
        )
    )


def train_and_save(
    rank: int, ranks: int, changes: Changes, folder: str, steps: int, more: int
) -> list[float]:
    """Losses of the steps behind the save."""
    config, blueprint, run = assembled(rank, ranks, changes)
    train(config, blueprint, run, steps)
    save(
        run,
        Path(folder),
        Progress(steps, steps, lr_samples=steps, optimizer_steps=run.engine.progress().steps),
    )
    return train(config, blueprint, run, more)


def load_and_save_again(
    rank: int, ranks: int, changes: Changes, folder: str, again: str, more: int
) -> list[float]:
    """Losses of the steps behind the load; what was loaded is saved as it is."""
    config, blueprint, run = assembled(rank, ranks, changes)
    store = Store(Path(folder), run.ctx)
    manifest, _ = store.newest_intact()
    assert manifest is not None
    fill_run(run, store, manifest, optimizer=True)
    run.progress.step = manifest.progress.step
    save(run, Path(again), manifest.progress)
    return train(config, blueprint, run, more)


def same_in_every_way(
    folder: Path,
    shared: Changes,
    changes: Changes,
    *,
    ranks: int = 2,
    steps: int = 2,
    more: int = 2,
    close: float = 1e-6,
) -> dict[str, str]:
    """Train on these ranks, save, go on; resume there and in one process; train in one process from the start.

    Losses behind the save are the same bits where the layout is, else close; what is loaded is what
    was saved: its hashes are returned.
    """
    saved, same, alone, one = (str(folder / name) for name in ("saved", "same", "alone", "one"))
    went_on = spawn(train_and_save, ranks, shared | changes, saved, steps, more)
    again = spawn(load_and_save_again, ranks, shared | changes, saved, same, more)
    assert again == went_on, (again, went_on)
    moved = load_and_save_again(0, 1, shared, saved, alone, more)
    assert moved == pytest.approx(went_on[0], rel=close)
    assert train_and_save(0, 1, shared, one, steps, more) == pytest.approx(went_on[0], rel=close)
    hashes = whole(Path(saved))
    assert hashes == whole(Path(same)) == whole(Path(alone))
    return hashes


def whole(folder: Path) -> dict[str, str]:
    """Hash of every global tensor of a checkpoint, put together in one process."""
    store = Store(folder, ParallelContext.serial())
    manifest, _ = store.newest_intact()
    assert manifest is not None
    hashes = {}
    for name, stored in manifest.tensors.items():
        dtype = TORCH_DTYPES[stored.dtype]
        data = torch.empty(stored.shape, dtype=dtype)
        store.load(manifest, [NamedSlice(name, stored.shape, (0,) * len(stored.shape), data)])
        flat = data.flatten().view(torch.uint8)
        hashes[name] = hashlib.sha256(flat.numpy().tobytes()).hexdigest()
    return hashes
