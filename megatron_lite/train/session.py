"""From a checked RunConfig to the end of training: joins the ranks, opens everything, trains, closes."""

from __future__ import annotations

import dataclasses
import functools
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import PrefixStore

from megatron_lite.blueprint.draw_up import Blueprint, draw_up, taken_up
from megatron_lite.checkpoint.snapshot import Origin
from megatron_lite.checkpoint.store import Store
from megatron_lite.config.errors import DataError, StorageError
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.layers.attention import choose_attention
from megatron_lite.parallel.calls.checking import Checker
from megatron_lite.parallel.collectives import barrier
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rendezvous.launch import (
    Launch,
    World,
    choose_device,
    gather,
    set_device_environment,
    start_process_group,
    stop_process_group,
    wait_for_all,
)
from megatron_lite.storage.disk import Disk
from megatron_lite.telemetry.recorder import Recorder
from megatron_lite.telemetry.throughput import IntervalMeter
from megatron_lite.telemetry.timers import format_times
from megatron_lite.telemetry.writers import EVERYTHING, Writers, open_writers
from megatron_lite.train.alike import OpenTokens, open_alike, plain
from megatron_lite.train.assemble import assemble
from megatron_lite.train.checkpoints import Checkpoints
from megatron_lite.train.ending.failures import Failures, stacks_on_signal
from megatron_lite.train.ending.faults import Fault, NoFaults, read_fault
from megatron_lite.train.ending.restart import Ended, write_ended
from megatron_lite.train.ending.stop import PREEMPTIONS, Reason, StopRequests
from megatron_lite.train.folder import RunFolder, begin, enter, of_the_run, remove_run
from megatron_lite.train.folder import notices as evaluation_notices
from megatron_lite.train.health.state_hash import state_hash
from megatron_lite.train.loop import Session
from megatron_lite.train.measuring.device import (
    be_deterministic,
    cpu_notices,
    device_peak,
    peak_notices,
)
from megatron_lite.train.measuring.log import LastResort, Log, form_of
from megatron_lite.train.measuring.profile import Profiler
from megatron_lite.train.measuring.reports import OwnTime
from megatron_lite.train.measuring.timeline import CollectiveLanes, StepRecording
from megatron_lite.train.measuring.timing import RunTimers
from megatron_lite.train.measuring.waits import Waits, measuring
from megatron_lite.train.patience import Verified, told
from megatron_lite.train.reading import Reach, Tokens, loaders_of, open_datasets, settle_data
from megatron_lite.train.resume import resume
from megatron_lite.train.run import Run
from megatron_lite.train.schedules import Schedules


def train(
    config: RunConfig,
    launch: Launch,
    open_tokens: OpenTokens,
    notices: list[str],
    failures: Failures,
) -> int:
    """Train as asked and return the exit code.  Every rank of the world calls it alike.

    After an exception the process group is left as it is: report it and end the process.
    """
    stacks_on_signal()
    faults = read_fault(launch.fault, launch.rank, launch.world_size, launch.attempt)
    deterministic, use_cpu = config.train.deterministic_mode, config.train.use_cpu
    said = set_device_environment(config.parallel, use_cpu=use_cpu, deterministic=deterministic)
    device = choose_device(launch, use_cpu=use_cpu, backend=config.parallel.distributed_backend)
    failures.device = device
    notices += said if device.type == "cuda" else []
    if deterministic:
        be_deterministic()
    notices += cpu_notices(config.precision, config.telemetry, device)
    notices += peak_notices(device)
    torch.backends.cuda.matmul.allow_tf32 = config.precision.tf32
    world = gather(launch, config.parallel, end=failures.lost)
    failures.presence = world.presence
    config, tokens = open_alike(open_tokens, launch, world, faults)
    folder = enter(config, launch, world, failures)
    if folder.code:
        world.presence.leave()
        return folder.code
    try:
        faults.at("init")
        start_process_group(launch, config.parallel, device, world)
        session = open_session(
            config, launch, tokens, device, notices, failures, faults, world, folder
        )
        try:
            code = _carry_out(session)
        finally:
            session.loaders.close()
            session.log.close()
    finally:
        folder.leave()
    stop_process_group()
    world.presence.leave()
    return code


def _carry_out(session: Session) -> int:
    reason: Reason = "finished"
    if not session.train.skip_train:
        length = session.reach.length
        if session.first_step >= length.iterations:
            flag = "--train-iters" if session.train.train_iters else "--train-samples"
            session.log.say(
                f"nothing left to do: the checkpoint has {session.first_step} of "
                f"{length.iterations} iterations ({session.progress.samples} of {length.samples} "
                f"samples); raise {flag} to go on"
            )
        session.stop.listen()
        session.log.say("training ...")
        reason = session.fit()
        barrier(session.run.ctx.world)  # the last rank's lines come first
        session.log.say(_farewell(session, reason))
        if nothing := session.learnt_nothing():
            session.log.warn(nothing)
        if reason == "finished" and session.reach.is_short:
            step = session.progress.step
            raise DataError(session.reach.say(f"they ended after iteration {step}"))
    if reason == "finished":
        session.log.say(*_final_evaluations(session))
        session.evaluate("validation", final=True)
        session.evaluate("test", final=True)
    if session.train.print_state_hash:
        value = state_hash(session.run)
        session.log.say(f" > state hash at iteration {session.progress.step}: {value}")
    code = session.train.exit_code_on_preemption if reason in PREEMPTIONS else 0
    if session.run.ctx.rank == 0:
        try:
            session.checkpoints.folder.require()
            write_ended(session.folder, Ended(code, reason, session.progress.step), Disk())
        except StorageError as error:  # a note about the run, whose work is done
            session.log.warn(f"how the run ended is not noted: {error}")
    session.log.say(f"exiting program at iteration {session.progress.step} datetime: {_now()}")
    return code


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _final_evaluations(session: Session) -> list[str]:
    """What the losses after the end are of: Megatron's lines differ from those on the way by a word."""
    loaders, batches = session.loaders, session.train.eval_iters
    sets = [
        n for n, one in (("validation", loaders.valid), ("test", loaders.test)) if one is not None
    ]
    if not sets or not batches:
        return []
    return [
        f"final evaluation of the trained model: {batches} batches of the {' set, then of the '.join(sets)} set"
    ]


def _farewell(session: Session, reason: Reason) -> str:
    step = session.progress.step
    store = session.checkpoints.store
    kept = "" if store is None else f"; checkpoint in {store.root}"
    if store is not None and reason != "finished":
        kept += f", --load {store.root} goes on"
    why = {
        "finished": "after training is done",
        "signal": "stopped by a signal: the step was finished",
        "kill-switch": f"stopped by --kill-switch-file {session.train.kill_switch_file}",
        "exit-interval": "stopped by --exit-interval",
        "exit-duration": "stopped by --exit-duration-in-mins",
    }[reason]
    return f"[{why}] iteration {step}{kept} datetime: {_now()}"


def open_session(
    config: RunConfig,
    launch: Launch,
    tokens: Tokens,
    device: torch.device,
    notices: list[str],
    failures: Failures,
    faults: Fault | NoFaults,
    world: World,
    folder: RunFolder,
) -> Session:
    """Open data, model, checkpoint and logs.  Collective over the world."""
    blueprint = draw_up(config, launch.world_size)
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
    checker = _checker(config, blueprint, launch, world)
    waits = measuring(device) if config.telemetry.watches(ctx.world_size) else None
    lanes = CollectiveLanes(recorder) if config.telemetry.profile_timeline else None
    ctx = ctx.observed(*filter(None, (checker, lanes, waits)))
    log = Log(ctx, form_of(config.telemetry))
    log.say(*notices, *evaluation_notices(config, folder.path))
    timers = RunTimers(config.telemetry.timing_log_level, device, recorder)
    with timers.span("model-and-optimizer-setup"):
        run = assemble(config, blueprint, ctx, timers=timers)
    if checker is not None:
        run.pipeline.reached = checker.reached
    log.say(*_description(run, blueprint), *_tokenizer_lines(tokens))
    log.say_of_shard(_shard_size(run))
    faults.attach(run)
    kept = config.checkpoint
    saves = kept.save is not None and kept.save_checkpoints and not config.train.skip_train
    store = Store(folder.path, ctx, at=faults.at, still_ours=folder.require) if saves else None
    checkpoints = Checkpoints.over(run, kept, log, failures.presence, store, folder)
    if not config.train.skip_train:
        log.say(checkpoints.describe())
    checkpoints.prepare()
    LastResort.install(folder.path, ctx.rank)
    curves = functools.partial(
        Schedules.from_config, config.learning_rate, config.optim, config.train
    )
    with timers.span("load-checkpoint"):
        tokenizer = {
            "type": config.data.tokenizer_type,
            "fingerprint": tokens.made_with.fingerprint,
            "vocab_size": tokens.vocab_size,
            "padded_vocab_size": run.setting.padded_vocab_size,
            "eod": tokens.eod,
        }
        verified = Verified(world.presence.tick)
        meet = functools.partial(wait_for_all, world, world_size=ctx.world_size)
        open_store = functools.partial(Store, at=faults.at, meet=meet, seen=verified.seen)
        with told("verifying and loading the checkpoint", log.say, verified.how_far):
            resumed = resume(
                run, config.checkpoint, config.learning_rate, curves, tokenizer, open_store,
                trains=not config.train.skip_train,
            )  # fmt: skip
    run.blueprint = taken_up(
        blueprint, config.train, run.progress.goes_on(blueprint.batch_schedule)
    )
    log.warn(*resumed.warnings)
    log.say(*resumed.notices)
    if run.blueprint.train_iters != blueprint.train_iters:
        log.say(f"setting training iterations to {run.blueprint.train_iters}")
    with timers.span("train/valid/test-data-iterators-setup"):
        batches = run.blueprint.batch_schedule
        datasets = open_datasets(
            config, launch, log, tokens, folder.path, batches, run.progress, world, faults
        )
    identity = settle_data(config, datasets, resumed.manifest, log)
    length = run.blueprint.length
    assert length is not None, "rules.check wants --train-iters or --train-samples"
    reach = Reach.of(length, batches, datasets, config.data.dataloader_type)
    if reach.is_short:
        log.warn(f"*** {reach.say(f'THE RUN WILL END AT ITERATION {reach.length.iterations}')} ***")
    if ctx.rank == 0:  # not before: a start that is refused leaves the run that is there
        log.say(*_begin_run(folder, config, tokens, run.progress.step, ctx.world_size))
    checkpoints.origin = Origin(tokenizer=tokenizer, data=identity, tokenizer_files=tokens.files)
    checkpoints.plain_config = plain(of_the_run(config)) | {
        "schedules": resumed.schedules.to_json()
    }
    checkpoints.saved_at = run.progress.step
    log.writers = _writers(config, folder.path, resumed.iteration or 0, log)
    wait_for_all(world, "start", ctx.world_size)  # packages of writers are loaded on rank 0
    log.say(f"done with setup ... datetime: {_now()}")
    log.say(format_times(timers.gather(ctx), option=config.telemetry.timing_log_option))
    faults.at("start")
    return Session(
        run=run,
        train=config.train,
        guards=config.guards,
        telemetry=config.telemetry,
        checkpoint=config.checkpoint,
        loaders=loaders_of(config, datasets, ctx, tokens),
        schedules=resumed.schedules,
        log=log,
        meter=IntervalMeter(
            train_iters=reach.length.iterations,
            train_samples=reach.length.samples,
            world_size=ctx.world_size,
            flops_per_token=blueprint.flops_per_token_full,
            causal_flops_per_token=blueprint.flops_per_token_causal,
            peak_tflops=device_peak(device),
        ),
        stop=StopRequests(config.train, looks=ctx.rank == 0),
        profiler=Profiler(config.telemetry, ctx.rank, folder.path / "traces", device),
        recording=StepRecording(
            config.telemetry, ctx, folder.path / "traces", _layout(blueprint), recorder
        ),
        folder=folder.path,
        checkpoints=checkpoints,
        presence=failures.presence,
        faults=faults,
        reach=reach,
        own_time=OwnTime(ctx, waits or Waits()),
        seq_length=config.model.seq_length,
    )


def _checker(
    config: RunConfig, blueprint: Blueprint, launch: Launch, world: World
) -> Checker | None:
    """Who compares the ranks' calls before they are made, where that was asked for."""
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
    folder: RunFolder, config: RunConfig, tokens: Tokens, iteration: int, world_size: int
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


def _shard_size(run: Run) -> str:
    ctx = run.ctx
    count = sum(local.parameter.numel() for local in run.parameters)
    return (
        " > number of parameters on (tensor, pipeline) model parallel rank "
        f"({ctx.tp.rank}, {ctx.pp.rank}): {count}"
    )


def _tokenizer_lines(tokens: Tokens) -> list[str]:
    return [
        f" > tokenizer: {tokens.made_with}",
        f" > end of document: {tokens.end_of_document}",
    ]


def _description(run: Run, blueprint: Blueprint) -> list[str]:
    grid, ctx = blueprint.grid, run.ctx
    return [
        f"using world size: {grid.world_size}, tensor-parallel {grid.tp} x pipeline-parallel {grid.pp} "
        f"x data-parallel {grid.dp} on {ctx.device.type}, {run.setting.precision.name}",
        f"setting training iterations to {blueprint.train_iters}",
        choose_attention(run.setting, training=True).why,
        f" > padded vocab (size: {run.setting.vocab_size}) to {run.setting.padded_vocab_size}",
    ]
