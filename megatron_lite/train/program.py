"""From a checked RunConfig to an exit code: joins the ranks, opens the session, trains, closes."""

from __future__ import annotations

import torch

from megatron_lite.config.errors import DataError, StorageError
from megatron_lite.config.rules.length import given_lengths
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.parallel.collectives import barrier
from megatron_lite.rendezvous.launch import (
    Launch,
    choose_device,
    gather_ranks,
    set_device_environment,
    start_process_group,
    stop_process_group,
)
from megatron_lite.storage.disk import Disk
from megatron_lite.train.alike import OpenTokens, open_alike
from megatron_lite.train.ending.failures import Failures, stacks_on_signal
from megatron_lite.train.ending.faults import read_fault
from megatron_lite.train.ending.restart import Ended, write_ended
from megatron_lite.train.ending.stop import PREEMPTIONS, Reason
from megatron_lite.train.folder import enter
from megatron_lite.train.health.state_hash import state_hash
from megatron_lite.train.loop import evaluate, fit, learnt_nothing
from megatron_lite.train.measuring.device import (
    be_deterministic,
    cpu_notices,
    peak_notices,
)
from megatron_lite.train.session import Session, Start, now, open_session


def train(
    config: RunConfig,
    launch: Launch,
    open_tokens: OpenTokens,
    notices: list[str],
    failures: Failures,
) -> int:
    """Train as asked and return the exit code.  Every rank of the world calls it.

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
    world = gather_ranks(launch, config.parallel, end=failures.lost)
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
            Start(config, launch, tokens, device, notices, failures, faults, world, folder)
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
            flag = next(iter(given_lengths(session.train)))
            session.log.say(
                f"nothing left to do: the checkpoint has {session.first_step} of "
                f"{length.iterations} iterations ({session.progress.samples} of {length.samples} "
                f"samples); raise {flag} to continue"
            )
        session.stop.listen()
        session.log.say("training ...")
        reason = fit(session)
        barrier(session.run.ctx.world)  # the last rank's lines come first
        session.log.say(_farewell(session, reason))
        if nothing := learnt_nothing(session):
            session.log.warn(nothing)
        if reason == "finished" and session.reach.is_short:
            step = session.progress.step
            raise DataError(session.reach.say(f"they ended after iteration {step}"))
    if reason == "finished":
        session.log.say(*_final_evaluations(session))
        evaluate(session, "validation", final=True)
        evaluate(session, "test", final=True)
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
    session.log.say(f"exiting program at iteration {session.progress.step} datetime: {now()}")
    return code


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
        kept += f", --load {store.root} resumes"
    why = {
        "finished": "after training is done",
        "signal": "stopped by a signal: the step was finished",
        "kill-switch": f"stopped by --kill-switch-file {session.train.kill_switch_file}",
        "exit-interval": "stopped by --exit-interval",
        "exit-duration": "stopped by --exit-duration-in-mins",
    }[reason]
    return f"[{why}] iteration {step}{kept} datetime: {now()}"
