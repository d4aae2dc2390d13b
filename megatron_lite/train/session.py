"""A Run and everything around its steps, opened one thing after the other."""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore

from megatron_lite.blueprint.draw_up import Blueprint, draw_up, taken_up
from megatron_lite.blueprint.length import told_of_epochs
from megatron_lite.checkpoint.base import KEY
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.snapshot import Origin
from megatron_lite.checkpoint.store import Store
from megatron_lite.config.objectives import OBJECTIVES
from megatron_lite.config.sections.checkpoint import CheckpointConfig
from megatron_lite.config.sections.guards import GuardsConfig
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.config.sections.telemetry import TelemetryConfig
from megatron_lite.config.sections.train import TrainConfig
from megatron_lite.data.build import Datasets
from megatron_lite.data.identity import Identity
from megatron_lite.kernels.compiled import Compiler
from megatron_lite.parallel.calls.checking import Checker
from megatron_lite.parallel.collectives import all_reduce, gather_text
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rendezvous.heartbeat import Presence
from megatron_lite.rendezvous.launch import (
    Launch,
    World,
    wait_for_all,
)
from megatron_lite.storage.disk import Disk
from megatron_lite.telemetry.recorder import Recorder
from megatron_lite.telemetry.throughput import IntervalMeter
from megatron_lite.telemetry.timers import format_times
from megatron_lite.telemetry.writers import EVERYTHING, Writers, open_writers
from megatron_lite.train.ahead import UnheardStep
from megatron_lite.train.alike import plain
from megatron_lite.train.assemble import assemble
from megatron_lite.train.checkpoints import Checkpoints
from megatron_lite.train.description import description, shard_size, tokenizer_lines
from megatron_lite.train.ending.failures import Failures
from megatron_lite.train.ending.faults import Fault, NoFaults
from megatron_lite.train.ending.stop import StopRequests
from megatron_lite.train.folder import RunFolder, begin, of_the_run, remove_run
from megatron_lite.train.folder import evaluation_notices as evaluation_notices
from megatron_lite.train.measuring.device import (
    device_peak,
    share_cores,
)
from megatron_lite.train.measuring.log import LastResort, Log, form_of
from megatron_lite.train.measuring.profile import Profiler
from megatron_lite.train.measuring.reports import OwnTime
from megatron_lite.train.measuring.timeline import CollectiveLanes, StepRecording
from megatron_lite.train.measuring.timing import RunTimers
from megatron_lite.train.measuring.waits import Waits, measuring
from megatron_lite.train.patience import Verified, told
from megatron_lite.train.reading import (
    Loaders,
    Reach,
    TokenizerFacts,
    loaders_of,
    open_datasets,
    settle_data,
)
from megatron_lite.train.resume import Resumed, resume
from megatron_lite.train.run import Run
from megatron_lite.train.schedules import Schedules


@dataclass(slots=True)
class Session:
    """A Run and everything around its steps.  Every rank carries out the same session."""

    run: Run
    train: TrainConfig
    guards: GuardsConfig
    telemetry: TelemetryConfig
    checkpoint: CheckpointConfig
    loaders: Loaders
    schedules: Schedules
    log: Log
    meter: IntervalMeter
    stop: StopRequests
    profiler: Profiler
    recording: StepRecording
    folder: Path
    checkpoints: Checkpoints
    reach: Reach
    own_time: OwnTime
    seq_length: int
    presence: Presence
    faults: Fault | NoFaults
    logged_at: int = field(init=False)
    progress: Progress = field(init=False)
    first_step: int = field(init=False)
    first_skipped: int = field(init=False)
    first_scale: float = field(init=False)
    unheard: UnheardStep | None = field(init=False, default=None)
    heard_at: float = field(init=False, default=0.0)
    reported_memory: bool = field(init=False, default=False)
    replicas_checked_at: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.progress = self.run.progress
        self.first_step = self.logged_at = self.progress.step
        self.first_skipped = self.progress.skipped_steps
        self.first_scale = self.run.engine.loss_scale


@dataclass(frozen=True, slots=True)
class Start:
    """What a session is opened from: what was asked, and who this process is among the others.

    notices: what there is to say before the first line of the run.
    """

    config: RunConfig
    launch: Launch
    tokens: TokenizerFacts
    device: torch.device
    notices: list[str]
    failures: Failures
    faults: Fault | NoFaults
    world: World
    folder: RunFolder


@dataclass(frozen=True, slots=True)
class Talk:
    """How this rank communicates and logs, and the observers of both."""

    ctx: ParallelContext
    log: Log
    timers: RunTimers
    recorder: Recorder
    waits: Waits
    checker: Checker | None


@dataclass(frozen=True, slots=True)
class OpenedData:
    """The data of a run: what they are, and how far they reach."""

    datasets: Datasets
    identity: Identity
    reach: Reach


def open_session(start: Start) -> Session:
    """Open talk, model, checkpoints, data and records, in this order.  Collective over the world."""
    blueprint = draw_up(start.config, start.launch.world_size)
    talk = _open_talk(start, blueprint)
    run = _build(start, blueprint, talk)
    checkpoints = _open_checkpoints(start, run, talk.log)
    resumed = _take_up(start, run, talk.log)
    found = _open_data(start, run, resumed, talk.log)
    _begin_records(start, run, checkpoints, resumed, found, talk.log)
    return _session(start, talk, run, checkpoints, resumed, found)


def _open_talk(start: Start, blueprint: Blueprint) -> Talk:
    """The groups of the grid, their observers, the log."""
    config, launch, device = start.config, start.launch, start.device
    ctx = (
        ParallelContext.from_grid(
            blueprint.grid,
            launch.rank,
            device,
            timeout=timedelta(minutes=config.parallel.distributed_timeout_minutes),
        )
        if launch.world_size > 1
        else ParallelContext.serial(device)
    )
    recorder = Recorder()
    checker = _checker(config, blueprint, launch, start.world)
    lanes = CollectiveLanes(recorder) if config.telemetry.profile_timeline else None
    waits = measuring(device) if config.telemetry.watches(ctx.world_size) else None
    ctx = ctx.observed(*filter(None, (checker, lanes, waits)))
    log = Log(ctx, form_of(config.telemetry))
    log.say(*start.notices, *evaluation_notices(config, start.folder.path))
    timers = RunTimers(config.telemetry.timing_log_level, device, recorder)
    return Talk(ctx, log, timers, recorder, waits or Waits(), checker)


def _build(start: Start, blueprint: Blueprint, talk: Talk) -> Run:
    """The stages and the engine of this rank, from random weights."""
    compiler = _tried(start.config, talk)
    if start.config.parallel.on_host:
        share_cores(start.launch.local_world_size, start.device)
    with talk.timers.span("model-and-optimizer-setup"):
        run = assemble(start.config, blueprint, talk.ctx, timers=talk.timers, compiler=compiler)
    if talk.checker is not None:
        run.pipeline.reached = talk.checker.reached
    talk.log.say(*description(run, blueprint, start.config), *tokenizer_lines(start.tokens))
    talk.log.say_of_shard(shard_size(run))
    start.faults.attach(run)
    return run


def _tried(config: RunConfig, talk: Talk) -> Compiler:
    """A compiler; where it fails on one rank no rank compiles, so that all compute the same.

    Collective over the world where one is wanted.
    """
    compiler = Compiler(warn=talk.log.warn)
    if not config.precision.compiles(on_gpu=talk.ctx.device.type == "cuda"):
        return compiler
    with told("trying the compiler", talk.log.say):
        failure = compiler.try_on(talk.ctx.device)
    said = gather_text(f"{failure or ''}\n", talk.ctx.world, talk.ctx.device)
    failures = [f"on rank {rank}: {text.strip()}" for rank, text in enumerate(said) if text.strip()]
    failed = torch.tensor(float(failure is not None), device=talk.ctx.device)
    if all_reduce(failed, talk.ctx.world).item():
        # only rank 0 knows what the others said, and only it speaks
        compiler.give_up(failures[0] if failures else "on a rank")
    compiler.warn = talk.log.warn_here  # from here on a rank may be alone with a failure
    return compiler


def _open_checkpoints(start: Start, run: Run, log: Log) -> Checkpoints:
    """Where checkpoints will go, tested for writing; output that neither stream takes goes beside them."""
    config, folder = start.config, start.folder
    kept, trains = config.checkpoint, not config.train.skip_train
    saves = kept.save is not None and kept.save_checkpoints and trains
    at, ours = start.faults.at, folder.require
    store = Store(folder.path, run.ctx, at=at, still_ours=ours) if saves else None
    checkpoints = Checkpoints.over(run, kept, log, start.failures.presence, store, folder)
    if trains:
        log.say(checkpoints.describe())
    checkpoints.prepare()
    LastResort.install(folder.path, run.ctx.rank)
    return checkpoints


def _take_up(start: Start, run: Run, log: Log) -> Resumed:
    """Weights, state and progress of --load, and the Blueprint of what is left to do."""
    config, world, blueprint = start.config, start.world, run.blueprint
    curves = functools.partial(
        Schedules.from_config, config.learning_rate, config.optim, config.train
    )
    with run.timers.span("load-checkpoint"):
        verified = Verified(world.presence.tick)
        meet = functools.partial(wait_for_all, world, world_size=run.ctx.world_size)
        open_store = functools.partial(Store, at=start.faults.at, meet=meet, seen=verified.seen)
        with told("verifying and loading the checkpoint", log.say, verified.how_far):
            resumed = resume(
                run, config.checkpoint, config.learning_rate, curves, _tokenizer(start, run),
                open_store, objective=config.train.objective, lora=config.lora,
                save=start.folder.path, trains=not config.train.skip_train,
            )  # fmt: skip
    run.blueprint = taken_up(
        blueprint, config.train, run.progress.goes_on(blueprint.batch_schedule)
    )
    log.warn(*resumed.warnings)
    log.say(*resumed.notices)
    if run.blueprint.train_iters != blueprint.train_iters:
        log.say(
            *told_of_epochs(config.train, run.blueprint.length),
            f"setting training iterations to {run.blueprint.train_iters}",
        )
    return resumed


def _open_data(start: Start, run: Run, resumed: Resumed, log: Log) -> OpenedData:
    """What is read, from where the checkpoint stands, and how far it reaches."""
    config, batches = start.config, run.blueprint.batch_schedule
    with run.timers.span("train/valid/test-data-iterators-setup"):
        datasets = open_datasets(
            config, start.launch, log, start.tokens, start.folder.path, batches, run.progress,
            start.world, start.faults,
        )  # fmt: skip
    identity = settle_data(config, datasets, resumed.manifest, log)
    length = run.blueprint.length
    assert length is not None, "rules.check wants a length, and its epochs are counted"
    reach = Reach.of(length, batches, datasets, config.data.dataloader_type)
    if reach.is_short:
        log.warn(f"*** {reach.say(f'THE RUN WILL END AT ITERATION {reach.length.iterations}')} ***")
    return OpenedData(datasets, identity, reach)


def _begin_records(
    start: Start, run: Run, checkpoints: Checkpoints, resumed: Resumed, found: OpenedData, log: Log
) -> None:
    """Describe the run in its folder and in checkpoints; open the writers on rank 0."""
    config, ctx, tokens = start.config, run.ctx, start.tokens
    if ctx.rank == 0:  # not before: a start that is refused leaves the run that is there
        log.say(*_begin_run(start.folder, config, tokens, run.progress.step, ctx.world_size))
    checkpoints.origin = Origin(
        tokenizer={**_tokenizer(start, run), **resumed.tokenizer}, data=found.identity,
        tokenizer_files=tokens.files,
    )  # fmt: skip
    checkpoints.plain_config = plain(of_the_run(config)) | {
        "schedules": resumed.schedules.to_json()
    }
    if resumed.base is not None:
        checkpoints.plain_config |= {KEY: resumed.base.to_json()}
    checkpoints.saved_at = run.progress.step
    log.writers = _writers(config, start.folder.path, resumed.iteration or 0, log)
    wait_for_all(start.world, "start", ctx.world_size)  # packages of writers are loaded on rank 0
    log.say(f"done with setup ... datetime: {now()}")
    log.say(format_times(run.timers.gather(ctx), option=config.telemetry.timing_log_option))
    start.faults.at("start")


def _session(
    start: Start,
    talk: Talk,
    run: Run,
    checkpoints: Checkpoints,
    resumed: Resumed,
    found: OpenedData,
) -> Session:
    config, ctx, blueprint = start.config, talk.ctx, run.blueprint
    traces, length = start.folder.path / "traces", found.reach.length
    return Session(
        run=run,
        train=config.train,
        guards=config.guards,
        telemetry=config.telemetry,
        checkpoint=config.checkpoint,
        loaders=loaders_of(config, found.datasets, ctx, start.tokens),
        schedules=resumed.schedules,
        log=talk.log,
        meter=IntervalMeter(
            train_iters=length.iterations,
            train_samples=length.samples,
            world_size=ctx.world_size,
            flops_per_token=blueprint.flops_per_token_full,
            causal_flops_per_token=blueprint.flops_per_token_causal,
            peak_tflops=device_peak(start.device),
            loss_name=OBJECTIVES[config.train.objective].loss_name,
        ),
        stop=StopRequests(config.train, looks=ctx.rank == 0),
        profiler=Profiler(config.telemetry, ctx.rank, traces, start.device),
        recording=StepRecording(config.telemetry, ctx, traces, _layout(blueprint), talk.recorder),
        folder=start.folder.path,
        checkpoints=checkpoints,
        presence=start.failures.presence,
        faults=start.faults,
        reach=found.reach,
        own_time=OwnTime(ctx, talk.waits),
        seq_length=config.model.seq_length,
    )


def now() -> str:
    """Date and time, for a line."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _tokenizer(start: Start, run: Run) -> dict[str, Any]:
    """What a checkpoint says of the tokenizer."""
    tokens = start.tokens
    return {
        "type": start.config.data.tokenizer_type,
        "fingerprint": tokens.made_with.fingerprint,
        "vocab_size": tokens.vocab_size,
        "padded_vocab_size": run.context.padded_vocab_size,
        "eod": tokens.eod,
    }


def _checker(
    config: RunConfig, blueprint: Blueprint, launch: Launch, world: World
) -> Checker | None:
    """The observer that compares the ranks' calls before they are made, where asked for."""
    if world.store is None or not config.parallel.check_collectives:
        return None
    presence = world.presence
    return Checker(
        PrefixStore(f"{world.prefix}/calls", world.store),
        rank=launch.rank,
        pp=blueprint.grid.coords(launch.rank).pp,
        step=lambda: presence.step or 0,
        seconds=config.parallel.distributed_timeout_minutes * 60.0,
    )


def _begin_run(
    folder: RunFolder, config: RunConfig, tokens: TokenizerFacts, iteration: int, world_size: int
) -> list[str]:
    """On rank 0, last of all; config.yaml starts the same run, so its vocabulary is the one asked for."""
    said = remove_run(folder.path, Disk()) if config.checkpoint.overwrite_run else []
    model = dataclasses.replace(config.model, vocab_size=tokens.asked or tokens.vocab_size)
    config = dataclasses.replace(config, model=model)
    begin(folder.path, config, iteration=iteration, world_size=world_size)
    return said


def _writers(config: RunConfig, folder: Path, resumed_iteration: int, log: Log) -> Writers:
    """Rank 0 writes; it may be without a writer's package, and then all ranks stop.

    A start that only evaluates adds to no run's curves: it has its own metrics.jsonl, which grows.
    """
    telemetry, enabled = config.telemetry, log.ctx.rank == 0
    if config.train.skip_train:
        telemetry = dataclasses.replace(telemetry, tensorboard_dir=None, wandb_project="")
        resumed_iteration = EVERYTHING
    return open_writers(telemetry, folder, resumed_iteration, warn=log.warn, enabled=enabled)


def _layout(blueprint: Blueprint) -> str:
    grid = blueprint.grid
    return f"{blueprint.schedule}, tp {grid.tp} pp {grid.pp} dp {grid.dp}"
