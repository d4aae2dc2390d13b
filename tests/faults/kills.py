"""Real `kill -9` at random times, seeds printed: what is left must be whole, and nothing told of is lost.

Each campaign is a function (count, seed, folder, tell) -> Counted; `tell` hears of progress.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import torch

from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.store import Keep, Store
from megatron_lite.data.preparing.preprocess import preprocess
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import NamedSlice
from megatron_lite.storage.disk import Disk
from megatron_lite.telemetry.record import StepRecord, read_metrics
from tests.support.folders import contents
from tests.support.launch import TINY, Running, StillAlive, in_session, launch, start
from tests.support.preprocess import hashes, job, numbers
from tests.support.sizes import with_flags
from tests.support.spawn import _context

Tell = Callable[[str], None]
ROWS = 150_000  # 0.6 MB a tensor: a save lasts long enough to be hit


@dataclass
class Counted:
    """What a campaign found.  outcomes: what happened -> how often; wrong: what must not have."""

    kills: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    lost: str = "nothing"

    def note(self, outcome: str) -> None:
        """One kill more."""
        self.kills += 1
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    @property
    def text(self) -> str:
        """In one line."""
        return ", ".join(f"{n} x {what}" for what, n in sorted(self.outcomes.items()))


def state(iteration: int, prefix: str = "") -> list[NamedSlice]:
    """Tensors that are a function of the iteration."""
    random = torch.Generator().manual_seed(iteration)
    return [
        NamedSlice(f"{prefix}{name}", (ROWS,), (0,), torch.randn(ROWS, generator=random))
        for name in "ab"
    ]


def intact(root: Path) -> int:
    """The iteration that loads, all of whose tensors must be its own, bit by bit."""
    store = Store(root, ParallelContext.serial())
    manifest, _ = store.newest_intact()
    assert manifest is not None, "nothing loads"
    expected = [*state(manifest.iteration), *state(manifest.iteration, "exp_avg.")]
    found = [
        NamedSlice(s.name, s.shape, s.offset, torch.full_like(s.data, torch.nan)) for s in expected
    ]
    store.load(manifest, found)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.data, theirs.data), f"{ours.name} is not of {manifest.iteration}"
    return manifest.iteration


def _save_on(root: str, first: int, pipe: Connection) -> None:
    os.setsid()
    torch.set_num_threads(1)
    store = Store(Path(root), ParallelContext.serial())
    for iteration in range(first, first + 1000):
        snapshot = store.snapshot(
            iteration,
            weights=state(iteration),
            optimizer=state(iteration, "exp_avg."),
            progress=Progress(iteration, iteration, lr_samples=iteration),
            config={},
        )
        pipe.send(("begin", iteration))
        store.save(snapshot, Keep(2))
        pipe.send(("end", iteration))


def _load_on(root: str, first: int, pipe: Connection) -> None:
    os.setsid()
    torch.set_num_threads(1)
    while True:
        pipe.send(("begin", first))
        pipe.send(("end", intact(Path(root))))


def _started(target: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    ours, theirs = _context().Pipe(duplex=False)
    process = _context().Process(target=target, args=(*arguments, theirs))
    process.start()
    theirs.close()
    return process, ours


def _heard(pipe: Connection, deadline: float = 60.0) -> tuple[str, int] | None:
    try:
        return pipe.recv() if pipe.poll(deadline) else None
    except EOFError:
        return None


def _kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)


def kill_saves(count: int, seed: int, folder: Path, tell: Tell) -> Counted:
    """S1: the last checkpoint that a save returned from, or the one being written, loads."""
    random, counted = Random(seed), Counted()
    root = folder / "saves"
    done, seconds = 0, 0.05
    while counted.kills < count:
        process, pipe = _started(_save_on, str(root), done + 1)
        began = 0.0
        for _ in range(2):  # one whole save first: it says how long they take now
            heard = _heard(pipe)
            assert heard is not None, "the writer died by itself"
            if heard[0] == "begin":
                began = time.monotonic()
            else:
                done, seconds = heard[1], max(time.monotonic() - began, 0.005)
        time.sleep(random.uniform(0, 1.2 * seconds))
        _kill(process)
        begun = done
        while (heard := _heard(pipe, 0.0)) is not None:
            done, begun = (heard[1], begun) if heard[0] == "end" else (done, heard[1])
        try:
            found = intact(root)
        except Exception as error:
            counted.wrong.append(f"kill {counted.kills}: {type(error).__name__}: {error}")
            found = -1
        if found not in (done, begun):
            counted.wrong.append(f"kill {counted.kills}: {found} loads, {done} was finished")
        elif found == done == begun:
            counted.note("between two saves")
        else:
            counted.note("old loads" if found == done else "new loads")
        done = max(done, found)
        counted.kills += found == -1
        if len(counted.wrong) > 3:
            break
        tell(f"{counted.kills}/{count}")
    return counted


def kill_loads(count: int, seed: int, folder: Path, tell: Tell) -> Counted:
    """A reader that dies changes nothing."""
    random, counted = Random(seed), Counted()
    root = folder / "loads"
    process, pipe = _started(_save_on, str(root), 1)
    while _heard(pipe) != ("end", 3):
        pass
    _kill(process)
    iteration = intact(root)
    before = contents(root)
    while counted.kills < count:
        process, pipe = _started(_load_on, str(root), iteration)
        _heard(pipe)
        time.sleep(random.uniform(0, 0.05))
        _kill(process)
        if contents(root) != before or intact(root) != iteration:
            counted.wrong.append(f"kill {counted.kills}: the folder changed")
        counted.note("folder unchanged, loads")
        tell(f"{counted.kills}/{count}")
    return counted


STEPS = 24
TRAINING = with_flags(
    TINY, "--train-iters", str(STEPS), "--print-state-hash", "--hidden-dropout", "0.1"
)


def _wait_for_step(running: Running, step: int, deadline: float = 120) -> None:
    """Return when a rank has printed the step, or all ranks have ended."""
    end = time.monotonic() + deadline
    while time.monotonic() < end and any(p.is_alive() for p in running.processes.values()):
        said = "".join(running.text(rank) for rank in running.processes)  # the last stage's rank
        found = re.findall(r"iteration +(\d+)/", said)
        if step == 0 or (found and int(found[-1]) >= step):
            return
        time.sleep(0.005)


def kill_training(
    count: int, seed: int, folder: Path, tell: Tell, ranks: int = 1, words: Sequence[str] = ()
) -> Counted:
    """L8: started again by the same line until it ends, a run is the one that was never killed."""
    random, counted = Random(seed), Counted()

    def flags(root: Path) -> list[str]:
        own = ["--save", str(root), "--load", str(root), "--save-interval", "1", "--keep-last", "2"]
        return with_flags(TRAINING, *own, *PARALLEL[ranks], *words)

    whole = launch(ranks, flags(folder / "whole"), deadline=120)
    assert all(rank.rc == 0 for rank in whole), whole[0].err
    seconds, expected = whole[0].seconds, _end_of(folder / "whole", whole[0].out)
    tell(f"an uninterrupted run takes {seconds:.1f} s")
    number = 0
    while counted.kills < count:
        root, done = folder / f"run{number}", 0
        number += 1
        for attempt in range(1000):
            running = start(ranks, flags(root))
            last = counted.kills >= count  # let it end
            in_start = random.random() < 0.25
            step = 99 if last else 0 if in_start else random.randint(min(done + 1, STEPS), STEPS)
            _wait_for_step(running, step)
            if not last:
                time.sleep(random.uniform(0, seconds / 2 if in_start else 0.05))
            alive = [r for r, p in running.processes.items() if p.is_alive()]
            if not alive:
                ended = running.wait(10)
                if any(rank.rc for rank in ended):
                    counted.wrong.append(f"start {attempt}: {ended[0].rc} {ended[0].err[-500:]}")
                elif (found := _end_of(root, ended[0].out)) != expected:
                    counted.wrong.append(f"run {number}: ended as {found[:1]}, not {expected[:1]}")
                break
            for rank in alive:
                running.kill(rank)
            try:
                ended = running.wait(240)
            except StillAlive as error:
                counted.wrong.append(str(error))
                break
            steps = re.findall(r"iteration +(\d+)/", "".join(rank.out for rank in ended))
            done = max(done, int(steps[-1]) if steps else 0)
            counted.note("killed after a step" if steps else "killed while starting")
            tell(f"{counted.kills}/{count}, run {number} at step {steps[-1] if steps else '-'}")
        if counted.wrong:
            break
        shutil.rmtree(root)
    counted.lost = "the step under way"
    counted.outcomes[f"of {number} runs each the uninterrupted one to the bit"] = number
    return counted


SOPHIA = ["--optimizer", "sophiag", "--sophia-hessian-interval", "3"]
ADAFACTOR = ["--optimizer", "adafactor", "--adafactor-scale-parameter"]
EIGHT_BITS = ["--optimizer", "adam8bit", "--adam8bit-block-size", "16"]
ZERO3 = ["--tensor-model-parallel-size", "1", "--micro-batch-size", "1", "--zero-stage", "3"]
PARALLEL = {1: [], 2: ["--tensor-model-parallel-size", "2"]}


def _end_of(root: Path, out: str) -> list[str]:
    """The hash of the whole state at the end, and loss and samples of every step."""
    (state_hash,) = re.findall(r"state hash at iteration \d+: ([0-9a-f]{64})", out)
    steps = [r for r in read_metrics(root / "metrics.jsonl") if isinstance(r, StepRecord)]
    numbers = [r.iteration for r in steps]
    assert numbers == list(range(1, len(numbers) + 1)), f"a gap or a repeat: {numbers}"
    return [state_hash, *(f"{r.loss!r} {r.samples}" for r in steps)]


def _preprocess(source: str, prefix: str, workers: int, pipe: Connection) -> None:
    os.setsid()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    preprocess(
        job(append_eod=True), inputs=[source], output_prefix=prefix, workers=workers, disk=Disk(),
        resume=True, batch_bytes=8000, mark_seconds=0,
    )  # fmt: skip
    pipe.send(("end", 0))


def kill_preprocess(count: int, seed: int, folder: Path, tell: Tell) -> Counted:
    """P10: resumed until it ends, the files are the bytes of one run; before, no name appears."""
    random, counted = Random(seed), Counted()
    source = numbers(folder / "a.jsonl", 3000)
    seconds = 60.0
    for attempt in ("first", "second"):  # the first one also starts what starts the others
        began = time.monotonic()
        process, pipe = _started(_preprocess, source, str(folder / attempt / "x"), 1)
        assert _heard(pipe) == ("end", 0)
        seconds = min(seconds, time.monotonic() - began)
        process.join(10)
    expected = hashes(folder / "first")
    assert len(expected) == 2
    number = 0
    while counted.kills < count:
        place = folder / f"run{number}"
        number += 1
        finished = False
        while not finished:
            workers = random.choice([1, 1, 2])
            process, pipe = _started(_preprocess, source, str(place / "x"), workers)
            patience = 120.0 if counted.kills >= count else random.uniform(0, 1.0) * seconds
            finished = _heard(pipe, patience) == ("end", 0)
            if finished:
                process.join(10)
                break
            if not process.is_alive():
                counted.wrong.append(f"run {number} ended by itself, code {process.exitcode}")
                break
            group = process.pid
            _kill(process)
            end = time.monotonic() + 20
            while in_session(group) and time.monotonic() < end:
                time.sleep(0.01)
            for orphan in in_session(group):
                counted.wrong.append(f"worker {orphan} outlived its parent by 20 s")
                os.kill(orphan, signal.SIGKILL)
            names = [n for n, h in hashes(place).items() if expected.get(n) != h]
            idx = [p for p in place.glob("*.idx")] if place.exists() else []
            if names and idx:
                counted.wrong.append(f"{names} appeared before they were whole")
            counted.note("files whole" if idx else "no file under its name")
            tell(f"{counted.kills}/{count}, run {number}")
        if finished and hashes(place) != expected:
            counted.wrong.append(f"run {number}: other bytes than an uninterrupted one")
        if counted.wrong:
            break
        shutil.rmtree(place)
    counted.outcomes[f"of {number} runs each the uninterrupted one's bytes"] = number
    counted.lost = "at most a batch, done again"
    return counted


CAMPAIGNS: dict[str, Callable[[int, int, Path, Tell], Counted]] = {
    "save": kill_saves,
    "load": kill_loads,
    "train": kill_training,
    "train on two ranks": lambda *given: kill_training(*given, ranks=2),
    "train with curvature": lambda *given: kill_training(*given, words=SOPHIA),
    "train with means": lambda *given: kill_training(*given, ranks=2, words=ADAFACTOR),
    "train in 8 bits": lambda *given: kill_training(*given, ranks=2, words=EIGHT_BITS),
    "train at ZeRO 3": lambda *given: kill_training(*given, ranks=2, words=ZERO3),
    "preprocess": kill_preprocess,
}
