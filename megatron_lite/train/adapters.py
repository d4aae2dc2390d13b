"""How a run of adapters begins and resumes: what they are trained beside, and where each weight is from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.checkpoint.base import Base, base_of, open_base
from megatron_lite.checkpoint.description import saved_adapters
from megatron_lite.checkpoint.manifest import Manifest
from megatron_lite.checkpoint.store import Store
from megatron_lite.config.sections.lora import LoraConfig
from megatron_lite.models.adapters import begin_magnitudes
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import NamedSlice, exact_slices
from megatron_lite.train.compatibility import check_adapters
from megatron_lite.train.run import Run


@dataclass(frozen=True, slots=True)
class Beside:
    """The frozen checkpoint that adapters are trained beside.

    fresh: the adapters begin here; else they are in a checkpoint of their own, which names this one.
    """

    store: Store
    manifest: Manifest
    fresh: bool

    def reference(self, run_folder: Path) -> Base:
        """What the checkpoints of the run in this folder say of it."""
        return Base.of(self.store.root, self.manifest, run_folder)


def find_beside(
    store: Store,
    manifest: Manifest,
    asked: LoraConfig,
    *,
    resumes: bool,
    open_store: Callable[[Path, ParallelContext], Store],
) -> Beside | None:
    """The base of what is asked for, from the checkpoint of --load; None where a whole model is trained.

    resumes: whether the optimizer's state continues, too.  Collective over the world.
    Raises CheckpointError where the checkpoint has other adapters, or none and state to resume.
    """
    folder = store.folder(manifest.iteration)
    kept = saved_adapters(manifest, folder)
    check_adapters(kept, asked, folder, resumes=resumes)
    if kept.on:
        found = open_base(base_of(manifest, folder), store.root, store.ctx, open_store)
        return Beside(*found, fresh=False)
    return Beside(store, manifest, fresh=True) if asked.on else None


def begin_beside(run: Run, beside: Beside) -> None:
    """Fill the frozen weights; the adapters keep their first values, which change nothing."""
    adapters = run.adapters

    def load(weights: list[NamedSlice]) -> None:
        frozen = [weight for weight in weights if weight.name not in adapters]
        beside.store.load(beside.manifest, exact_slices(frozen, beside.manifest.tensors))

    run.engine.fill(load)
    for stage in run.pipeline.stages.values():
        begin_magnitudes(stage.module)
