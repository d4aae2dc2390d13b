"""spawn(check, ranks): run a function on gloo ranks started by a preloaded forkserver (0.2 s for 8)."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "torch.distributed", "torch.optim.adamw", "tests.support.preload"]


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def free_port() -> int:
    """A port of this machine that nobody uses right now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _as_torchrun(rank: int, ranks: int, port: int) -> None:
    """The environment torchrun would give."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip


def _rank_main(
    pipe: Connection, check: Callable[..., Any], rank: int, ranks: int, store: str,
    port: int | None, arguments: tuple,
) -> None:  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    join = port is None and ranks > 1
    try:
        if port is not None:
            _as_torchrun(rank, ranks, port)
        if join:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks,
                timeout=timedelta(seconds=60),
            )  # fmt: skip
        result = check(rank, ranks, *arguments)
        pipe.send((True, result))
        if join:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException as error:  # the parent must hear of it, whatever it is
        pipe.send((False, (f"{type(error).__name__}: {error}", traceback.format_exc())))
        os._exit(1)  # the others must not wait for a destructor of this rank


class RankFailed(AssertionError):
    """At least one rank raised; `errors` maps rank -> 'Type: message'."""

    def __init__(self, errors: dict[int, str], traces: dict[int, str]) -> None:
        first = min(traces)
        super().__init__(f"ranks {sorted(errors)} failed; rank {first}:\n{traces[first]}")
        self.errors = errors


def spawn(
    check: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    deadline: float = 90.0,
    join: bool = True,
) -> list:
    """[check(rank, ranks, *arguments) of every rank]; the process group is up inside check.

    join=False: the ranks get torchrun's environment instead and join by themselves.
    check must be a module-level function.  Past the deadline the ranks are killed and named.
    """
    context = _context()
    port = None if join else free_port()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes, pipes = [], {}
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(theirs, check, rank, ranks, store, port, arguments),
                daemon=True,
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes[ours] = rank
        return _collect(processes, pipes, ranks, deadline)


def _collect(processes: list, pipes: dict, ranks: int, deadline: float) -> list:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    traces: dict[int, str] = {}
    end = time.monotonic() + deadline
    waiting = dict(pipes)
    while waiting and not errors:
        ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            alive = sorted(waiting.values())
            for process in processes:
                process.kill()
            raise TimeoutError(f"ranks {alive} of {ranks} still ran after {deadline:g} s")
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                good, value = pipe.recv()
            except EOFError:
                good, value = False, ("died without a word", "died without a word")
            if good:
                results[rank] = value
            else:
                errors[rank], traces[rank] = value
    for process in processes:
        process.join(timeout=0.5 if errors else 20.0)
        if process.is_alive():
            process.kill()
            process.join()
    if errors:
        for pipe, rank in list(waiting.items()):  # what the others had to say by now
            if pipe.poll():
                try:
                    good, value = pipe.recv()
                except EOFError:
                    continue
                if not good:
                    errors[rank], traces[rank] = value
        raise RankFailed(errors, traces)
    return [results[rank] for rank in range(ranks)]
