"""Taking up a checkpoint: the newest intact one, a loud fresh start, or a clear refusal."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.checkpoint.manifest import Manifest
from megatron_lite.checkpoint.store import Store
from megatron_lite.config.checkpoint import CheckpointConfig
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.optim import LearningRateConfig
from megatron_lite.parallel.shard import MASTER, exact_slices, weight_slices
from megatron_lite.train.assemble import Run


@dataclass(frozen=True, slots=True)
class Resumed:
    """What was loaded: its iteration (None for a fresh start), lines to print, the LR settings to use."""

    iteration: int | None
    notices: list[str]
    learning_rate: LearningRateConfig


def resume(run: Run, checkpoint: CheckpointConfig, learning_rate: LearningRateConfig) -> Resumed:
    """Fill the run from --load.  Collective over the world.

    Raises CheckpointError where there are checkpoints but none usable, where they do not fit the
    model, or where the learning-rate flags differ and no flag says which to take.
    """
    if checkpoint.load is None:
        return Resumed(None, [], learning_rate)
    store = Store(Path(checkpoint.load), run.ctx)
    manifest, notices = store.newest_intact(checkpoint.ckpt_step)
    if manifest is None:
        if checkpoint.exit_on_missing_checkpoint:
            raise CheckpointError(
                f"--load {checkpoint.load} holds no checkpoint and --exit-on-missing-checkpoint is "
                "set: check the path, or leave the flag out to start fresh"
            )
        line = f"*** no checkpoint in --load {checkpoint.load}: STARTING FRESH, from random weights ***"
        return Resumed(None, [*notices, line], learning_rate)
    with_optimizer = checkpoint.load_optim and not checkpoint.finetune
    if not checkpoint.finetune:
        learning_rate = _settle_learning_rate(manifest, learning_rate, checkpoint.load)
    _fill(run, store, manifest, optimizer=with_optimizer)
    if checkpoint.finetune:
        notices.append("--finetune: weights loaded; iteration, samples and optimizer start anew")
        return Resumed(None, notices, learning_rate)
    run.progress = dataclasses.replace(manifest.progress)
    if with_optimizer:
        run.engine.steps = manifest.progress.optimizer_steps
        if manifest.progress.loss_scale:
            run.engine.scaler.load(manifest.progress.loss_scale)
    notices.append(
        f"  successfully loaded checkpoint from {checkpoint.load} at iteration {manifest.iteration}"
    )
    return Resumed(manifest.iteration, notices, learning_rate)


def _fill(run: Run, store: Store, manifest: Manifest, *, optimizer: bool) -> None:
    state = list(run.engine.state(owned=False))
    masters = [s for s in state if s.name.startswith(MASTER)]
    moments = [s for s in state if not s.name.startswith(MASTER)] if optimizer else []
    weights = list(weight_slices(run.parameters, run.ctx, owned=False))
    exact = exact_slices([*weights, *masters], manifest.tensors)
    store.load(manifest, [*exact, *moments])


def _settle_learning_rate(
    manifest: Manifest, asked: LearningRateConfig, folder: str
) -> LearningRateConfig:
    """The settings to go on with: equal ones, or whichever the user chose by a flag."""
    saved = manifest.config.get("learning_rate", {})
    choices = {"override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"}
    names = [f.name for f in dataclasses.fields(asked) if f.name not in choices]
    differ = [n for n in names if n in saved and saved[n] != getattr(asked, n)]
    if not differ or asked.override_opt_param_scheduler:
        return asked
    if asked.use_checkpoint_opt_param_scheduler:
        return dataclasses.replace(asked, **{n: saved[n] for n in differ})
    lines = "".join(f"\n  --{n.replace('_', '-')}: {saved[n]} in the checkpoint, "
                    f"{getattr(asked, n)} on this command line" for n in differ)  # fmt: skip
    raise CheckpointError(
        f"{folder} was trained with other learning-rate settings:{lines}\nadd "
        "--override-opt-param-scheduler to take this command line's, or "
        "--use-checkpoint-opt-param-scheduler to keep the checkpoint's"
    )
