"""The run folder: who owns it, what another run left there, and what describes the run.

    enter ──▶ chosen, locked, looked at ──▶ setup ──▶ begin ──▶ training ──▶ leave

<run folder>/run.lock       while a run trains (storage/lock.py)
<run folder>/config.yaml    the run: what every start of it has in common
<run folder>/starts.jsonl   each start: when, from where, and what was asked of it alone
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.store import POINTER, Store
from megatron_lite.config.errors import ConfigError, MegatronLiteError, StorageError
from megatron_lite.config.flags.files import dump
from megatron_lite.config.flags.settings import settings
from megatron_lite.config.sections.checkpoint import CheckpointConfig
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rendezvous.launch import Launch, World, from_rank_0
from megatron_lite.storage.disk import Disk, write_atomically
from megatron_lite.storage.lock import FolderLock, FolderTaken
from megatron_lite.storage.outputs import check_folder
from megatron_lite.telemetry.writers import METRICS_FILE
from megatron_lite.train.ending.failures import Failures
from megatron_lite.train.ending.restart import begin_attempt, refusal

CONFIG = "config.yaml"
STARTS = "starts.jsonl"


@dataclass(slots=True)
class RunFolder:
    """Where a run writes; the same path on all ranks, the lock on rank 0.

    code: not 0 where this start makes no sense; rank 0 has said why.  problem: why it has no lock.
    """

    path: Path
    code: int = 0
    lock: FolderLock | None = None
    problem: StorageError | None = None
    temporary: bool = False

    def require(self) -> None:
        """Raise StorageError where the folder is not, or not any more, this run's.  For rank 0."""
        if self.lock is not None:
            self.lock.check()
        elif self.problem is not None:
            raise self.problem

    @property
    def lost(self) -> StorageError | None:
        """What happened to the folder during the run and was not reported yet."""
        return self.lock.problem if self.lock is not None and not self.lock.told else None

    def leave(self) -> None:
        """Release it; a folder made for this start in which nothing was written is removed."""
        if self.lock is not None:
            self.lock.release()
            if self.temporary:
                with contextlib.suppress(StorageError):
                    self.lock.disk.remove_empty(self.path)


def enter(config: RunConfig, launch: Launch, world: World, failures: Failures) -> RunFolder:
    """The folder this start may write into, or the exit code of all ranks.  Collective over the world."""
    held: list[RunFolder] = []

    def look() -> str:
        mine = _enter_alone(config, launch, failures)
        held.append(mine)
        return json.dumps([str(mine.path), mine.code])

    path, code = json.loads(from_rank_0(launch, world, look))
    if not code:
        failures.folder, failures.entered = Path(path), True
    return held[0] if held else RunFolder(Path(path), code)


def _enter_alone(config: RunConfig, launch: Launch, failures: Failures) -> RunFolder:
    save = _kept(config)
    refused = refusal(config.train, save, attempt=launch.attempt)
    if refused is not None:
        if not refused.told:
            failures.refuse(refused)
        return RunFolder(save or Path(), refused.exit_code)
    disk = Disk()
    try:
        require_places(config, save, disk)
    except MegatronLiteError as error:
        failures.folder = None
        failures.refuse(error)
        return RunFolder(save or Path(), error.exit_code)
    folder = _new_folder(disk) if save is None else _locked(save, disk)
    try:
        if isinstance(folder.problem, FolderTaken):
            raise folder.problem
        if save is not None:
            found = Store(save, ParallelContext.serial()).iterations()
            require_own(config.checkpoint, found, attempt=launch.attempt)
    except MegatronLiteError as error:
        folder.leave()
        failures.folder = None  # it is another run's
        failures.refuse(error)
        return RunFolder(folder.path, error.exit_code)
    with contextlib.suppress(StorageError):  # Store.prepare finds it too, on all ranks
        if folder.lock is not None:
            begin_attempt(folder.path, disk, attempt=launch.attempt)
    return folder


def require_places(config: RunConfig, save: Path | None, disk: Disk) -> None:
    """The folders to be written into are there or can be made: found out later it costs an index."""
    asked: dict[str, str | Path | None] = {
        "--save": save,
        "--data-cache-path": config.data.data_cache_path,
    }
    if not config.train.skip_train:
        asked["--tensorboard-dir"] = config.telemetry.tensorboard_dir
    for flag, folder in asked.items():
        if folder is not None:
            check_folder(flag, folder, disk, may_be_full=True)


def evaluation_notices(config: RunConfig, folder: Path) -> list[str]:
    """What a start that only evaluates does otherwise."""
    if not config.train.skip_train:
        return []
    said = [f"--skip-train: records go to {folder}, no run is written into"]
    telemetry = config.telemetry
    if telemetry.tensorboard_dir or telemetry.wandb_project:
        said.append(
            "--skip-train: nothing goes to TensorBoard or W&B, whose curves are the training's"
        )
    return said


def _kept(config: RunConfig) -> Path | None:
    """--save, unless it holds a run and this start only evaluates: a run looked at stays as it is."""
    save = config.checkpoint.save
    if save is None or not config.train.skip_train:
        return Path(save) if save is not None else None
    folder = Path(save)
    loaded = config.checkpoint.load is not None and _same(config.checkpoint.load, save)
    runs = loaded or any(os.path.exists(folder / name) for name in (CONFIG, POINTER))
    return None if runs else folder


def _same(a: str, b: str) -> bool:
    return Path(a).resolve() == Path(b).resolve()


def _locked(path: Path, disk: Disk) -> RunFolder:
    try:
        return RunFolder(
            path, lock=FolderLock.take(path, disk, lambda line: print(line, flush=True))
        )
    except StorageError as error:
        return RunFolder(path, problem=error)


def _new_folder(disk: Disk) -> RunFolder:
    """runs/<now>, with a number behind it where two start in one second."""
    now = Path("runs") / time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        path = now if number == 1 else now.with_name(f"{now.name}_{number}")
        if os.path.exists(path):
            continue
        found = _locked(path, disk)
        if not isinstance(found.problem, FolderTaken):
            found.temporary = True
            return found
    raise AssertionError("numbers do not end")


def require_own(asked: CheckpointConfig, found: list[int], *, attempt: int = 0) -> None:
    """Raise ConfigError where --save holds checkpoints (found: newest first) that are another run's."""
    assert asked.save is not None
    loads = asked.load is not None and _same(asked.load, asked.save)
    if asked.load is not None and _same(str(Path(asked.load).parent), asked.save):
        return  # one of its checkpoints, which resume() refuses in words of its own
    if loads and asked.overwrite_run:
        raise ConfigError(
            f"--overwrite-run removes the run in --save {asked.save}, and --load resumes it: leave "
            "one of them out"
        )
    if not found or (loads and not asked.finetune):
        return
    if loads:
        raise ConfigError(
            f"--finetune starts a new run from --load {asked.load}, and --save is the same folder: its "
            "checkpoints would replace those it starts from - give another --save, or leave out "
            "--finetune to resume"
        )
    holds = f"--save {asked.save} holds checkpoints, the newest of iteration {found[0]}"
    if asked.overwrite_run and attempt:
        raise ConfigError(
            f"{holds}, and this is restart {attempt}: --overwrite-run would remove what was trained "
            f"before it - start again with --load {asked.save} instead"
        )
    if not asked.overwrite_run:
        raise ConfigError(
            f"{holds}, that this run does not resume - give --load {asked.save} (without "
            "--finetune) to resume, another --save, or --overwrite-run to remove that run"
        )


def remove_run(folder: Path, disk: Disk) -> list[str]:
    """Remove the checkpoints and records of the run that was here; what to say about it."""
    found = Store(folder, ParallelContext.serial(), disk).iterations()
    if not found:
        return []
    disk.remove(folder / POINTER)
    for iteration in found:
        checkpoint = Store(folder, ParallelContext.serial()).folder(iteration)
        aside = folder / f".{checkpoint.name}.removed.partial"  # never a folder half removed
        disk.remove_tree(aside)
        disk.rename(checkpoint, aside)
        disk.remove_tree(aside)
    for name in (METRICS_FILE, STARTS):
        disk.remove(folder / name)
    disk.remove_tree(folder / "traces")
    return [
        f"--overwrite-run: removed {len(found)} checkpoints from {folder}, the newest of {found[0]}"
    ]


def of_the_run(config: RunConfig) -> RunConfig:
    """What every start of the run has in common; a run that began elsewhere resumes from its own folder."""
    for setting in settings().values():
        if setting.one_start:
            section = getattr(config, setting.section)
            section = dataclasses.replace(section, **{setting.name: setting.default})
            config = dataclasses.replace(config, **{setting.section: section})
    asked = config.checkpoint
    own = asked.save if asked.load is not None else None
    asked = dataclasses.replace(
        asked,
        load=own,
        exit_on_missing_checkpoint=asked.exit_on_missing_checkpoint and own is not None,
    )
    return dataclasses.replace(config, checkpoint=asked)


def of_this_start(config: RunConfig) -> dict[str, Any]:
    """section.field -> value of what was asked of one start and not of the run."""
    run = of_the_run(config)
    asked = {}
    for key, setting in settings().items():
        value = getattr(getattr(config, setting.section), setting.name)
        if value != getattr(getattr(run, setting.section), setting.name):
            asked[key] = value
    return asked


def begin(folder: Path, config: RunConfig, *, iteration: int, world_size: int) -> None:
    """Record what describes the run and what was asked of this start.  On rank 0.

    A start that only evaluates describes no run.
    """
    disk = Disk()
    disk.make_folder(folder)
    if not config.train.skip_train:
        write_atomically(folder / CONFIG, dump(of_the_run(config)).encode(), disk)
    start = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "iteration": iteration,
        "world_size": world_size,
        "asked": of_this_start(config),
    }
    path = folder / STARTS
    before = path.read_bytes() if os.path.isfile(path) else b""
    write_atomically(path, before + (json.dumps(start) + "\n").encode(), disk)
