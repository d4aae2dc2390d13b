"""How a run of adapters begins and resumes: what they are trained beside, and where each weight is from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megatron_lite.checkpoint.adapters import AdapterSet
from megatron_lite.checkpoint.base import Base, base_of, open_base
from megatron_lite.checkpoint.description import saved_adapters
from megatron_lite.checkpoint.huggingface.peft_reading import open_peft
from megatron_lite.checkpoint.manifest import Manifest
from megatron_lite.checkpoint.store import Store
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.lora_targets import target_modules
from megatron_lite.config.sections.lora import LoraConfig
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.models.adapters import begin_magnitudes
from megatron_lite.models.packing import in_turn
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import MASTER, NamedSlice, exact_slices
from megatron_lite.train.compatibility import check_adapters
from megatron_lite.train.run import Run


@dataclass(frozen=True, slots=True)
class Beside:
    """The frozen checkpoint that adapters are trained beside.

    fresh: the adapters begin here; else they are in a checkpoint of their own, which names this one.
    kept: how its matrices were kept where these adapters were saved; None: they are new.
    """

    store: Store
    manifest: Manifest
    fresh: bool
    kept: LoraConfig | None = None

    def kept_otherwise(self, now: LoraConfig) -> list[str]:
        """A line where the adapters go on beside other roundings of the same weights."""
        if self.kept is None or self.kept.lora_base == now.lora_base:
            return []
        return [
            f"--lora-base: {self.kept.lora_base} -> {now.lora_base}: the adapters go on beside the same "
            "weights, rounded otherwise; the loss begins with that difference"
        ]

    def fill(self, run: Run, weights: list[NamedSlice]) -> None:
        """The frozen ones among them, and what the run keeps packed.  Collective over the world."""
        names, stored = run.adapters, self.manifest.tensors
        frozen = [weight for weight in weights if weight.name.removeprefix(MASTER) not in names]
        groups = chain([frozen], in_turn(run.packed))
        self.store.load_in_turn(self.manifest, (exact_slices(group, stored) for group in groups))

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
    if kept.on and asked.lora_load is not None:
        raise CheckpointError(
            f"--lora-load {asked.lora_load}: {folder} holds adapters already: give --load their base, or leave "
            "out --lora-load"
        )
    if kept.on:
        found = open_base(base_of(manifest, folder), store.root, store.ctx, open_store)
        return Beside(*found, fresh=False, kept=kept)
    return Beside(store, manifest, fresh=True) if asked.on else None


def begin_beside(run: Run, beside: Beside, asked: LoraConfig) -> list[str]:
    """Fill the frozen weights; the adapters keep their first values, which change nothing, or begin with
    those of --lora-load.  Returns what to say.  Collective over the world.
    """
    names, folder, model = run.adapters, asked.lora_load, run.context.model
    loaded = None if folder is None else open_peft(Path(folder), model)
    if loaded is not None:
        _require_same(loaded, asked, model)

    def load(weights: list[NamedSlice]) -> None:
        beside.fill(run, weights)
        if loaded is not None:
            loaded.check_base(weights)
            loaded.fill(weight for weight in weights if weight.name.removeprefix(MASTER) in names)

    run.engine.fill(load, masters=True)
    if loaded is not None:
        return [f"--lora-load: the adapters begin as those in {folder}"]
    for stage in run.pipeline.stages.values():
        begin_magnitudes(stage.module)
    return []


def _require_same(loaded: AdapterSet, asked: LoraConfig, model: ModelConfig) -> None:
    """Raise CheckpointError where the folder's adapters are not those of the command line."""
    found = loaded.lora
    pairs = {
        "--lora-rank": (found.lora_rank, asked.lora_rank),
        "--lora-alpha": (found.lora_alpha, asked.lora_alpha),
        "--lora-variant": (found.lora_variant, asked.lora_variant),
        "--lora-targets": tuple(
            " ".join(sorted(target_modules(one.lora_targets, model))) for one in (found, asked)
        ),
    }
    differ = [
        f"{flag}: {has} -> {wanted}" for flag, (has, wanted) in pairs.items() if has != wanted
    ]
    if differ:
        lines = "".join(f"\n  {line}" for line in differ)
        raise CheckpointError(
            f"--lora-load {loaded.where} holds other adapters (folder -> this command line):{lines}\n"
            "give the folder's values"
        )
