"""Resuming from a checkpoint: the newest intact one, a loud fresh start, or a clear refusal."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lite.blueprint.batches import BatchSchedule
from megatron_lite.blueprint.figure.parts import HEAD, SLOWING
from megatron_lite.blueprint.optimizers import Own
from megatron_lite.checkpoint.base import Base
from megatron_lite.checkpoint.description import saved_model
from megatron_lite.checkpoint.manifest import NAME, Manifest
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.store import Store
from megatron_lite.checkpoint.tensor_file import SAFETENSORS_NAMES
from megatron_lite.config.context_length import stretch_warnings
from megatron_lite.config.errors import CheckpointError, NumericsError
from megatron_lite.config.objectives import LANGUAGE_MODEL
from megatron_lite.config.rules.model_identity import named
from megatron_lite.config.sections.checkpoint import CheckpointConfig
from megatron_lite.config.sections.lora import LoraConfig
from megatron_lite.config.sections.optim import LearningRateConfig, OptimConfig
from megatron_lite.engines.base import EngineProgress
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import MASTER, STATE_DTYPES, NamedSlice, exact_slices
from megatron_lite.train.adapters import Beside, begin_beside, find_beside
from megatron_lite.train.compatibility import (
    check_model,
    check_objective,
    check_tokenizer,
    handed_on,
)
from megatron_lite.train.health.culprit import earliest_over_ranks
from megatron_lite.train.health.replay import Watched
from megatron_lite.train.run import Run
from megatron_lite.train.schedules import Schedules

_OWN, _SLOWING = f"{HEAD}.", f"{SLOWING}."
"""Begin of the names that belong to a head alone, and of what is learned of rotary frequencies."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """What was loaded: its iteration (None where training starts at 0), what to say, the curves to use.

    warnings: what went wrong on the way; notices: what was done; manifest: of the checkpoint it resumes;
    base: what its adapters are trained beside, where it has some; tokenizer: what is handed on of it.
    """

    iteration: int | None
    schedules: Schedules
    warnings: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    manifest: Manifest | None = None
    base: Base | None = None
    tokenizer: dict[str, Any] = field(default_factory=dict)


def resume(
    run: Run,
    checkpoint: CheckpointConfig,
    learning_rate: LearningRateConfig,
    curves: Callable[[BatchSchedule], Schedules],
    tokenizer: dict[str, Any],
    open_store: Callable[[Path, ParallelContext], Store] = Store,
    *,
    objective: str = LANGUAGE_MODEL,
    lora: LoraConfig | None = None,
    save: Path | None = None,
    trains: bool = True,
) -> Resumed:
    """Fill the run from --load.  Collective over the world.

    curves: those of this command line, under a batch schedule; tokenizer: see check_tokenizer.
    objective: what this run optimises; lora: the adapters that it trains; save: its folder, from which
    their base is found; trains: whether steps follow, for which curves matter.
    Raises CheckpointError where there are checkpoints but none usable, or weights of other
    programs; where they are of another model, or were trained with another tokenizer or objective;
    where the curves differ from the checkpoint's and no flag says which to take.
    """
    fresh = run.blueprint.batch_schedule
    if checkpoint.load is None:
        return Resumed(None, curves(fresh))
    store = open_store(Path(checkpoint.load), run.ctx)
    manifest, found = store.newest_intact(checkpoint.ckpt_step)
    warnings = tuple(found)
    if manifest is None:
        line = _nothing_there(run, checkpoint)
        return Resumed(None, curves(fresh), (*warnings, line))
    keeps = checkpoint.keep_optim or not checkpoint.finetune
    with_optimizer = checkpoint.load_optim and keeps
    schedules = curves(fresh if checkpoint.finetune else manifest.progress.goes_on(fresh))
    folder, model = store.folder(manifest.iteration), run.context.model
    before = saved_model(manifest, folder, head=None)
    beside = find_beside(
        store, manifest, lora or LoraConfig(), resumes=keeps, open_store=open_store
    )
    changes = check_model(before, model, folder, allowed=named(checkpoint.allow_model_change))
    warnings += tuple(stretch_warnings(before, model))
    told, fresh_head = check_objective(manifest, objective, folder, goes_on=keeps)
    notices = (
        told + changes + check_tokenizer(manifest, tokenizer, allowed=checkpoint.allow_data_change)
    )
    if with_optimizer:
        goes_on = trains and not checkpoint.finetune
        schedules, said = _settle_updates(
            run, manifest, learning_rate, schedules, checkpoint.load, goes_on=goes_on
        )
        notices += said
    known = before.rope_scaling_type == "clex" or model.rope_scaling_type != "clex"
    if not known:
        notices.append(
            "--rope-scaling-type clex: what it learns starts anew, which is no other than ntk"
        )
    if beside is not None and beside.fresh:
        notices += begin_beside(run, beside, lora or LoraConfig())
    else:
        fill_run(
            run, store, manifest, optimizer=with_optimizer, head=not fresh_head, slowing=known,
            beside=beside,
        )  # fmt: skip
        notices += [] if beside is None else beside.kept_otherwise(lora or LoraConfig())
    base = None if beside is None else beside.reference(save or store.root)
    resumed = functools.partial(Resumed, base=base, tokenizer=handed_on(manifest, tokenizer))
    _require_finite(run, manifest, checkpoint.load)
    loaded = (
        f"  successfully loaded checkpoint from {checkpoint.load} at iteration {manifest.iteration}"
    )
    if checkpoint.finetune:
        notices.append(_start_anew(run, manifest.progress, with_optimizer=with_optimizer))
        return resumed(None, schedules, warnings, (*notices, loaded))
    run.progress = dataclasses.replace(manifest.progress)
    if not with_optimizer:
        notices.append("--no-load-optim: optimizer state and loss scale start anew")
    return resumed(manifest.iteration, schedules, warnings, (*notices, loaded), manifest)


def _nothing_there(run: Run, checkpoint: CheckpointConfig) -> str:
    """What to say of a start from random weights, where that is what --load can mean; else CheckpointError."""
    assert checkpoint.load is not None
    _require_ours(Path(checkpoint.load))
    if checkpoint.finetune or run.adapters:
        what = "--finetune starts from" if checkpoint.finetune else "adapters are trained beside"
        raise CheckpointError(
            f"{what} weights, and --load {checkpoint.load} holds no checkpoint: check the path"
        )
    if checkpoint.exit_on_missing_checkpoint:
        raise CheckpointError(
            f"--load {checkpoint.load} holds no checkpoint and --exit-on-missing-checkpoint is "
            "set: check the path, or leave the flag out to start fresh"
        )
    return f"*** no checkpoint in --load {checkpoint.load}: STARTING FRESH, from random weights ***"


def _start_anew(run: Run, saved: Progress, *, with_optimizer: bool) -> str:
    """The first step of another run, from loaded weights; what is kept, in a line."""
    if not with_optimizer:
        return "--finetune: weights only; iteration, samples and optimizer start anew"
    run.progress = Progress(
        optimizer_steps=saved.optimizer_steps,
        inherited_steps=saved.optimizer_steps,
        loss_scale=dict(saved.loss_scale),
    )
    return (
        f"--finetune --keep-optim: weights, the optimizer's state after {saved.optimizer_steps} updates "
        f"and loss scale {run.engine.loss_scale:g} go on; iteration and samples start at 0, data and "
        "learning rate are this command line's"
    )


def _require_ours(folder: Path) -> None:
    """A folder without checkpoints may be that of a new run; one with other people's weights is a mistake."""
    if os.path.isfile(folder):
        what = "is a file - give the run folder, and --ckpt-step for an older iteration"
    elif re.fullmatch(r"iter_\d+", folder.name) and os.path.exists(folder / NAME):
        step = int(folder.name.removeprefix("iter_"))
        what = f"is one checkpoint of a run - give --load {folder.parent} --ckpt-step {step}"
    elif os.path.isfile(folder / "config.json"):
        what = (
            f"is a folder of Hugging Face - `python tools/convert.py {folder} START` makes one of ours: "
            "--load START --finetune"
        )
    elif any(f.suffix in (".pt", ".pth", ".ckpt") for f in folder.glob("*")):
        what = (
            "holds pickled weights, which are never opened - see tools/convert.py for what can be"
        )
    else:
        return
    raise CheckpointError(f"--load {folder} {what}")


def _require_optimizer(run: Run, manifest: Manifest, folder: str) -> None:
    """All ranks look for the states of the whole model, so all find the same."""
    plan, updates = run.blueprint, manifest.progress.optimizer_steps
    names = {
        f"{state.name}.{spec.name}": spec.name in manifest.tensors
        for spec in plan.parameters
        for state in plan.states(spec.tensor, updates)
    }
    missing = [name for name, stored in names.items() if stored and name not in manifest.tensors]
    if missing:
        some = f" for {len(missing)} of {len(names)} tensors, {missing[0]} first"
        raise CheckpointError(
            f"checkpoint {manifest.iteration} in {folder} holds no state of this optimizer"
            f"{some if len(missing) < len(names) else ''} (it was "
            "saved with --no-save-optim, another --optimizer, other --param-groups or --lisa-layers): add "
            "--no-load-optim to resume with a fresh one, or --finetune to start at iteration 0 with its "
            "weights"
        )
    for spec in plan.parameters:
        for state in plan.states(spec.tensor, updates):
            stored = manifest.tensors.get(f"{state.name}.{spec.name}")
            weight, here = manifest.tensors.get(spec.name), state.of(spec.tensor.shape)
            if stored is None or weight is None or weight.shape[1:] != spec.tensor.shape[1:]:
                continue  # another model's: see check_fit
            where = f"checkpoint {manifest.iteration} in {folder} holds"
            if state.block > 1 and stored.shape[-1:] != here[-1:]:
                raise CheckpointError(
                    f"{where} {stored.shape[-1]} blocks of a row of {spec.name}, and blocks of "
                    f"{state.block} are {here[-1]}: give the --adam8bit-block-size that it was saved "
                    "with, or --no-load-optim"
                )
            if stored.shape != here and any(isinstance(dim, Own) for dim in state.dims or ()):
                raise CheckpointError(
                    f"{where} {state.name} of {spec.name} as {list(stored.shape)}, and it is {list(here)} "
                    "here: give what of the optimizer it was saved with (--galore-rank), or --no-load-optim"
                )


def _other_formats(run: Run, manifest: Manifest) -> list[str]:
    """A line for each state that the checkpoint has in another number format than this run."""
    plan, updates = run.blueprint, manifest.progress.optimizer_steps
    found = {
        (state.name, stored.dtype, state.storage)
        for spec in plan.parameters
        for state in plan.states(spec.tensor, updates)
        if (stored := manifest.tensors.get(f"{state.name}.{spec.name}")) is not None
        and stored.dtype != SAFETENSORS_NAMES[STATE_DTYPES[state.storage]]
    }
    return [
        f"{name}: {before.lower()} in the checkpoint, {now} here: "
        + ("kept exactly" if now == "fp32" else "rounded to nearest")
        for name, before, now in sorted(found)
    ]


def fill_run(
    run: Run,
    store: Store,
    manifest: Manifest,
    *,
    optimizer: bool,
    head: bool = True,
    slowing: bool = True,
    beside: Beside | None = None,
) -> None:
    """Weights, masters and, where asked for, optimizer state, from whatever layout and precision was saved.

    head, slowing: whether the head's matrix, and what is learned of rotary frequencies, are among them;
    else they keep their first values.
    beside: where all but the adapters is from, in a run that trains these.
    """
    if optimizer:  # first of all: which states there are follows from it
        saved = manifest.progress
        run.engine.resume(EngineProgress(saved.optimizer_steps, saved.loss_scale))
    new = tuple(prefix for prefix, stored in ((_OWN, head), (_SLOWING, slowing)) if not stored)
    state, adapters = run.engine.state(owned=False), run.adapters
    moments = [s for s in state if not s.name.startswith(MASTER)] if optimizer else []
    moments = [s for s in moments if not s.name.partition(".")[2].startswith(_SLOWING) or slowing]

    def load(weights: list[NamedSlice]) -> None:
        stored = [w for w in weights if not w.name.removeprefix(MASTER).startswith(new)]
        if beside is not None:
            beside.fill(run, stored)
            stored = [w for w in stored if w.name.removeprefix(MASTER) in adapters]
        store.load(manifest, [*exact_slices(stored, manifest.tensors), *moments])

    run.engine.fill(load, masters=True)


def _require_finite(run: Run, manifest: Manifest, folder: str) -> None:
    """Training from a value that is not finite would be time lost.  Collective over the world."""
    watched = Watched(run)
    watched.look_at_weights()
    watched.look_at_state()
    first, _ = earliest_over_ranks(watched.first, run.ctx)
    if first is not None:
        raise NumericsError(
            f"checkpoint {manifest.iteration} in {folder}: {first.text} - take an older one with "
            "--ckpt-step, and leave --check-for-nan-in-loss-and-grad on"
        )


def _settle_updates(
    run: Run,
    manifest: Manifest,
    flags: LearningRateConfig,
    asked: Schedules,
    folder: str,
    *,
    goes_on: bool,
) -> tuple[Schedules, list[str]]:
    """The curves to resume with, and what to say of them, of groups and of the optimizer's state."""
    said: list[str] = []
    if goes_on:
        said = _settle_same(run, manifest, flags, folder, ["param_groups"])
    _require_optimizer(run, manifest, folder)
    if goes_on:
        asked, told = _settle_schedules(manifest, flags, asked, folder)
        said += told + _settle_same(run, manifest, flags, folder, _RESIZES)
    return asked, said + _other_formats(run, manifest)


def _settle_schedules(
    manifest: Manifest, flags: LearningRateConfig, asked: Schedules, folder: str
) -> tuple[Schedules, list[str]]:
    """The curves to resume with, and what to say: equal ones, or whichever a flag chose."""
    try:
        saved = Schedules.from_json(manifest.config["schedules"])
    except ValueError as error:
        raise CheckpointError(
            f"the manifest of checkpoint {manifest.iteration} in {folder} is damaged: {error} - take "
            "an older one with --ckpt-step"
        ) from None
    except KeyError as error:
        if flags.use_checkpoint_opt_param_scheduler:
            raise CheckpointError(
                f"checkpoint {manifest.iteration} in {folder} does not say its learning-rate "
                f"schedule ({error}): leave out --use-checkpoint-opt-param-scheduler"
            ) from None
        return asked, ["learning rate: the checkpoint does not say its schedule; the flags count"]
    differ = saved.differences(asked)
    if not differ:
        return asked, []
    if flags.override_opt_param_scheduler:
        return asked, [f"--override-opt-param-scheduler: {line}" for line in differ]
    if flags.use_checkpoint_opt_param_scheduler:
        kept = asked.differences(saved)
        return saved, [f"--use-checkpoint-opt-param-scheduler: {line}" for line in kept]
    lines = "".join(f"\n  {line}" for line in differ)
    raise CheckpointError(
        f"{folder} was trained with another learning-rate schedule (checkpoint -> this command "
        f"line):{lines}\nadd --override-opt-param-scheduler to take this command line's, or "
        "--use-checkpoint-opt-param-scheduler to keep the checkpoint's"
    )


_RESIZES = (
    "optimizer", "adafactor_scale_parameter", "muon_scale_mode", "muon_extra_scale_factor", "galore_scale",
)  # fmt: skip
"""Settings that make other steps of the same --lr, and that no state tells apart."""


def _settle_same(
    run: Run, manifest: Manifest, flags: LearningRateConfig, folder: str, names: Sequence[str]
) -> list[str]:
    """What to say where settings of the optimizer differ, so that tensors move by other steps."""
    section, now = manifest.config.get("optim"), run.blueprint.optim
    saved = section if isinstance(section, dict) else {}
    differ = [
        f"--{name.replace('_', '-')}: {before} -> {after}"
        for name in names
        if (before := _told(saved.get(name, getattr(OptimConfig(), name))))
        != (after := _told(getattr(now, name)))
    ]
    if not differ:
        return []
    if flags.override_opt_param_scheduler:
        return [f"--override-opt-param-scheduler: {line}" for line in differ]
    raise CheckpointError(
        f"{folder} was trained with other updates (checkpoint -> this command line): {', '.join(differ)}; "
        "give the checkpoint's, add --override-opt-param-scheduler to take this command line's, or "
        "--no-load-optim to begin with a fresh state"
    )


def _told(value: object) -> str:
    words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return _SAME_STATES.get(words, words) or "none"


_SAME_STATES = {"apex-adam": "adam"}
"""Another kernel of the same optimizer."""
