"""launch(ranks, argv): the real tools/pretrain_gpt.py, or another, on gloo ranks, and no orphans.

Ranks come from the preloaded forkserver, so they start in a moment, but are processes of their own:
own session, own stdout and stderr in files, real signals, real exit codes.

    running = start(2, TINY)              and then running.kill(1, signal.SIGSTOP), running.wait()
    ended = launch(2, TINY, fault="step3.forward:1:sigkill", deadline=30)
    ended[0].rc, ended[0].err, ended[0].seconds
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

from tests.support.places import ROOT
from tests.support.sizes import SEQ, tiny_flags, with_flags
from tests.support.spawn import _context, free_port

TOOL = ROOT / "tools" / "pretrain_gpt.py"
LAUNCHER = TOOL.with_name("launch.py")

TINY = [
    *tiny_flags(
        model__num_layers=2, model__hidden_dropout=None, model__attention_dropout=None,
        model__max_position_embeddings=SEQ, train__global_batch_size=4, train__train_iters=6,
        learning_rate__lr_decay_style=None,
    ),
    "--tokenizer-type", "NullTokenizer", "--log-interval", "1", "--eval-iters", "0",
]  # fmt: skip
"""A run of a fraction of a second per rank, for one to four ranks."""

WITHOUT_DATA = with_flags(TINY, without=("--mock-data",))
"""What it trains on is still to be said."""

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
"""What torchrun says to the second of two ranks."""


LAUNCHER_NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "MLITE_FAULT", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT",
)  # fmt: skip


def set_environment(monkeypatch: pytest.MonkeyPatch, values: dict[str, str | None]) -> None:
    """The variables of a launcher are these and no others; None: not set."""
    for name in LAUNCHER_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        if value is not None:
            monkeypatch.setenv(name, value)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a rank ended: exit code (minus the signal's number), what it wrote, seconds it took."""

    rank: int
    rc: int
    out: str
    err: str
    seconds: float

    @property
    def fatal(self) -> str:
        """Its FATAL line, with what belongs to it; "" where there is none."""
        return self.err[self.err.find("FATAL[") :] if "FATAL[" in self.err else ""


class StillAlive(AssertionError):
    """Ranks ran past the deadline (they have been killed), or left processes behind."""


def _rank_main(tool: str, argv: Sequence[str], env: dict[str, str], out: str, err: str) -> None:
    os.setsid()  # what this rank starts can be found and ended with it
    for descriptor, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in LAUNCHER_NAMES:
        os.environ.pop(name, None)
    os.environ.update(env)
    sys.argv = [str(TOOL.with_name(f"{tool}.py")), *argv]
    importlib.import_module(f"megatron_lite.cli.{tool}").start()


@dataclass
class Running:
    """Ranks under way; use as a context manager or call wait().  Nothing outlives it."""

    processes: dict[int, Any]
    folder: Any
    began: float = field(default_factory=time.monotonic)
    _seconds: dict[int, float] = field(default_factory=dict)

    def text(self, rank: int, stream: str = "out") -> str:
        """What the rank has written so far; stream is out or err."""
        path = Path(self.folder.name) / f"{rank}.{stream}"
        return path.read_text(errors="replace") if path.is_file() else ""

    def wait_for(self, rank: int, text: str, *, stream: str = "out", deadline: float = 30) -> None:
        """Return when the rank has written the text."""
        end = time.monotonic() + deadline
        while text not in self.text(rank, stream):
            if time.monotonic() > end or not self.processes[rank].is_alive():
                said = self.text(rank, "err")[-2000:]
                raise AssertionError(f"rank {rank} never wrote {text!r}; stderr: {said}")
            time.sleep(0.02)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send the rank a signal."""
        os.kill(self.processes[rank].pid, number)

    def wait(self, deadline: float = 60.0, *, stopped: Sequence[int] = ()) -> list[Ended]:
        """All ranks ended, by themselves; raises StillAlive past the deadline, naming who still runs.

        deadline counts from the start.  stopped: ranks that were SIGSTOPped and cannot end: they
        are killed once the others have ended.
        """
        try:
            self._join([r for r in self.processes if r not in stopped], deadline)
            for rank in stopped:
                self.processes[rank].kill()
            self._join(list(stopped), deadline + 10)
            self._require_no_orphans()
            return [self._ended(rank) for rank in self.processes]
        finally:
            self.close()

    def _join(self, ranks: Sequence[int], deadline: float) -> None:
        waiting = {self.processes[rank].sentinel: rank for rank in ranks}
        while waiting:
            left = self.began + deadline - time.monotonic()
            ready = wait(list(waiting), timeout=max(0.0, left))
            if not ready:
                alive = sorted(waiting.values())
                tails = "".join(f"\n--- rank {r}: {self.text(r, 'err')[-1500:]}" for r in alive)
                raise StillAlive(f"ranks {alive} still ran after {deadline:g} s{tails}")
            for sentinel in ready:
                self._seconds[waiting.pop(sentinel)] = time.monotonic() - self.began
        for rank in ranks:
            self.processes[rank].join(5)

    def _require_no_orphans(self) -> None:
        left = {p.pid: orphans for p in self.processes.values() if (orphans := in_session(p.pid))}
        if left:
            raise StillAlive(f"processes outlived their rank: {left}")

    def _ended(self, rank: int) -> Ended:
        rc = self.processes[rank].exitcode
        return Ended(rank, rc, self.text(rank), self.text(rank, "err"), self._seconds[rank])

    def close(self) -> None:
        """Kill what still runs; only what was started here."""
        for process in self.processes.values():
            for pid in in_session(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if process.is_alive():
                process.kill()
            process.join(5)
        self.folder.cleanup()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def in_session(leader: int) -> list[int]:
    """Processes of the session the rank leads, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] not in "ZX":
                    found.append(int(entry.name))
    return found


def start(
    ranks: int,
    argv: Sequence[str] | Callable[[int], Sequence[str]],
    *,
    env: dict[str, str | None] | Callable[[int], dict[str, str | None]] | None = None,
    fault: str | None = None,
    only: Sequence[int] | None = None,
    outputs: dict[str, str] | None = None,
    tool: str = "pretrain_gpt",
) -> Running:
    """Start the ranks; argv and env may be functions of the rank, a None in env unsets the name.

    fault: MLITE_FAULT of all.  only: start just these ranks of the world.  outputs: the file that
    out or err goes to, such as /dev/full.
    """
    folder = tempfile.TemporaryDirectory(prefix="launch-")
    for stream, path in (outputs or {}).items():
        for rank in range(ranks):
            (Path(folder.name) / f"{rank}.{stream}").symlink_to(path)
    port = free_port()
    processes = {}
    for rank in range(ranks) if only is None else only:
        given: dict[str, str | None] = {
            "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "MLITE_FAULT": fault,
        }  # fmt: skip
        given |= (env(rank) if callable(env) else env) or {}
        process = _context().Process(
            target=_rank_main,
            args=(
                tool,
                list(argv(rank) if callable(argv) else argv),
                {name: value for name, value in given.items() if value is not None},
                *(str(Path(folder.name) / f"{rank}.{stream}") for stream in ("out", "err")),
            ),
            daemon=True,
        )
        process.start()
        processes[rank] = process
    return Running(processes, folder)


def launch(
    ranks: int,
    argv: Sequence[str] | Callable[[int], Sequence[str]],
    *,
    env: dict[str, str | None] | Callable[[int], dict[str, str | None]] | None = None,
    fault: str | None = None,
    only: Sequence[int] | None = None,
    deadline: float = 60.0,
) -> list[Ended]:
    """Start the ranks and wait for all of them; see start and Running.wait."""
    return start(ranks, argv, env=env, fault=fault, only=only).wait(deadline)
