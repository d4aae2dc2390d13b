"""How a rank ends badly: one FATAL line, errors/rank<r>.json, and the others told why."""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

import torch

from megatron_lite.config.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceFault,
    DistributedError,
    ExtensionError,
    MegatronLiteError,
    OutOfMemory,
)
from megatron_lite.config.exit import BUG, fatal_line
from megatron_lite.config.extensions import in_extension, whose_bug
from megatron_lite.config.streams import settle_output
from megatron_lite.rendezvous.heartbeat import Alone, Presence
from megatron_lite.storage.disk import Disk, write_atomically
from megatron_lite.storage.lock import LOCK
from megatron_lite.train.ending.stop import Stopped, stop_signals

SIGNS = (
    "Connection closed by peer", "Connection reset", "Broken pipe", "Timed out", "timed out",
    "Socket", "NCCL", "connectFullMesh", "Gloo", "gloo", "recvBytes", "sendBytes",
)  # fmt: skip
"""Parts of the texts by which gloo and NCCL say that a collective failed."""

FIRST_SPEAKS_SECONDS = 3.0
"""How long the other ranks of a host keep silent about what the first is about to say, too."""


def stop_at_once() -> None:
    """Until the loop listens, a signal that asks for a stop ends the start: with a FATAL line, not silently."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    for number in stop_signals():
        signal.signal(number, stop)


class Failures:
    """Reports the failure that ends this process, once; the main thread or the failure detector.

    folder: the run folder, as soon as there is one; entered: whether it is this run's, so that
    nothing is written into another's.  torchrun hides a worker's exit code, so errors/rank<r>.json
    there keeps it.  speaks_first: of the ranks of a host that fail alike.  device, plan: what the
    rank runs on, and what to say where its memory was too small by so many bytes.
    """

    def __init__(
        self, rank: int, *, folder: Path | None, debug: bool, speaks_first: bool = True
    ) -> None:
        self.rank, self.folder, self.debug = rank, folder, debug
        self.speaks_first = speaks_first
        self.presence: Presence = Alone()
        self.entered = False
        self.device = torch.device("cpu")
        self.plan: Plan = _no_plan
        self._once = threading.Lock()

    def report(self, error: BaseException) -> int:
        """Print, write, tell the other ranks; returns the exit code.  In the main thread."""
        if not self._once.acquire(blocking=False):
            threading.Event().wait()  # the watch is ending this process with its own line
        known = self._in_our_words(error)
        if isinstance(known, ConfigError | DataError) and isinstance(self.presence, Alone):
            self._let_the_first_speak(known.exit_code)
        alike = isinstance(known, ConfigError | DataError | CheckpointError)
        line, code = self._say(known, aloud=not alike or self.presence.says_first(str(known)))
        self.presence.leave(line)
        return code

    def _let_the_first_speak(self, code: int) -> None:
        """Before the ranks have met, one of a host finds what all find: a launcher then ends the others."""
        if self.speaks_first:
            return
        for number in stop_signals():
            signal.signal(number, lambda *_: os._exit(code))
        time.sleep(FIRST_SPEAKS_SECONDS)

    def refuse(self, refused: MegatronLiteError) -> None:
        """Report, on one rank for all, why nothing is started; the others end with its code silently."""
        self._say(refused)

    def lost(self, verdict: str) -> None:
        """End the process with code 6: the main thread may be stuck in a collective for good."""
        if not self._once.acquire(blocking=False):
            return  # the main thread has found the words
        _, code = self._say(DistributedError(verdict))
        settle_output()
        os._exit(code)

    def _in_our_words(self, error: BaseException) -> BaseException:
        if out_of_memory(error):
            missing = missing_bytes(str(error))
            where = "host memory" if self.device.type == "cpu" else f"memory of {self.device}"
            return OutOfMemory(
                f"rank {self.rank} is out of {where}: {_first_line(error)[:300]}{_held(self.device)}"
                + self.plan(missing, on_gpu=self.device.type == "cuda", room=_room(self.device))
            )
        if isinstance(error, RuntimeError) and device_failed(error):
            first = _first_line(error)
            verdict = self.presence.explain(first)
            if (
                first not in verdict
            ):  # a lost rank takes its memory with it: its neighbours' kernels fail
                return DistributedError(verdict)
            return DeviceFault(
                f"rank {self.rank}: {self.device} failed and no rank is missing: {first} - look at the "
                "node's log (dmesg: Xid) and leave the node out if it comes again; "
                "CUDA_LAUNCH_BLOCKING=1 names the line"
            )
        if isinstance(error, RuntimeError) and failed_collective(error):
            return DistributedError(self.presence.explain(_first_line(error)))
        return in_extension(error)

    def _say(self, error: BaseException, *, aloud: bool = True) -> tuple[str, int]:
        line, code = _line_and_code(error, self.rank, self.presence.step)
        if aloud:
            print(line, file=sys.stderr, flush=True)
        unforeseen = code == BUG or isinstance(error, ExtensionError)
        if self.debug or (unforeseen and aloud):
            traceback.print_exception(error)
        folder = self.folder
        if (
            folder is not None
            and os.path.isdir(folder)
            and (self.entered or not os.path.exists(folder / LOCK))
        ):
            self._write(error, code, line)
        return line, code

    def _write(self, error: BaseException, code: int, line: str) -> None:
        assert self.folder is not None
        text = {
            "rank": self.rank,
            "exit_code": code,
            "step": self.presence.step,
            "error": str(error),
            "fatal": line,
            "time": time.time(),
        }
        if code == BUG or isinstance(error, ExtensionError):
            text["traceback"] = "".join(traceback.format_exception(error))
        disk = Disk()
        path = self.folder / "errors" / f"rank{self.rank}.json"
        try:
            disk.make_folder(path.parent)
            write_atomically(path, (json.dumps(text, indent=1) + "\n").encode(), disk)
        except MegatronLiteError as problem:  # the failure itself has been printed already
            print(f"({path} cannot be written: {problem})", file=sys.stderr)


NO_ROOM = (
    "CUDA out of memory", "'out of memory'", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory", "Cannot allocate memory", "not enough memory",
)  # fmt: skip
"""Parts of the texts of errors that are about memory and have no class of their own."""

DEVICE_SIGNS = (
    "CUDA error:", "CUDA driver error", "CUBLAS_STATUS_", "CUDNN_STATUS_", "cudaError",
    "an illegal memory access", "device-side assert",
)  # fmt: skip


def stacks_on_signal() -> None:
    """SIGUSR2 prints every thread's stack on stderr; the run continues.

    In C, so that it answers where the main thread is stuck in a collective or in a kernel.
    """
    if sys.__stderr__ is not None and hasattr(signal, "SIGUSR2"):
        faulthandler.register(signal.SIGUSR2, file=sys.__stderr__, all_threads=True, chain=False)


def failed_collective(error: RuntimeError) -> bool:
    """Whether a collective failed, rather than our code."""
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or any(sign in text for sign in SIGNS)


def end_process(code: int) -> NoReturn:
    """End without destructors: those of a process group wait for ranks that are gone."""
    settle_output()
    os._exit(code)


class Plan(Protocol):
    """What to say of a rank's planned memory, where so many bytes were missing."""

    def __call__(self, missing: float, *, on_gpu: bool, room: float) -> str:
        """Begins with a dash; names a way out."""
        ...


def _held(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return ""
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    return f" - tensors hold {held / 2**30:.2f} GiB, {free / 2**30:.2f} of {total / 2**30:.2f} GiB are free"


def _room(device: torch.device) -> float:
    """Bytes of a GPU; 0 for a host, whose memory ranks and other programs share."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return 0.0
    return float(torch.cuda.mem_get_info(device)[1])


def _no_plan(missing: float, *, on_gpu: bool, room: float) -> str:
    return " - lower --micro-batch-size or split the model further"


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no room, as torch and Python say it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in NO_ROOM)


def missing_bytes(text: str) -> float:
    """How much was asked for and not there; 0 where the text does not say.

    >>> missing_bytes("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")
    2684354560.0
    """
    found = re.search(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", text)
    unit = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    return float(found[1]) * unit[found[2]] if found else 0.0


def device_failed(error: RuntimeError) -> bool:
    """Whether CUDA says so: an error of a kernel, of memory access, of the device itself."""
    if isinstance(error, torch.distributed.DistError):
        return False
    kind = getattr(torch, "AcceleratorError", None)  # torch < 2.8 has none
    return (kind is not None and isinstance(error, kind)) or any(
        sign in str(error) for sign in DEVICE_SIGNS
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _line_and_code(error: BaseException, rank: int, step: int | None) -> tuple[str, int]:
    if isinstance(error, KeyboardInterrupt):
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        done = "before the first step" if step is None else f"after step {step}"
        where = f"rank={rank} step={'-' if step is None else step}"
        return (
            f"FATAL[{128 + number}] {where}: stopped by {name} {done} - no checkpoint was written "
            "for this - start again; --load of the --save folder resumes from the last one",
            128 + number,
        )
    if isinstance(error, MegatronLiteError):
        return fatal_line(error, rank=rank, step=step), error.exit_code
    line = fatal_line(error, rank=rank, step=step).splitlines()[0]  # the traceback has the rest
    return f"{line} - {whose_bug()}", BUG
