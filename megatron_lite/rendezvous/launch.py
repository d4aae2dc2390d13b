"""Process group, device and threads of this process; the only reader of RANK and WORLD_SIZE."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megatron_lite.config.errors import ConfigError, DistributedError
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.rendezvous.copies import alone_among_many
from megatron_lite.rendezvous.detector import Limits
from megatron_lite.rendezvous.heartbeat import (
    Alone,
    Liveness,
    Presence,
    fact_differences,
    roll_call,
)
from megatron_lite.rendezvous.reminder import Reminder, numbers

_NCCL_FAILED = "exception_dump"
"""Key of torch's ProcessGroupNCCL, outside of every prefix, so that it survives a restart."""


@dataclass(frozen=True, slots=True)
class Launch:
    """This process's rank and world as torchrun sets them; a world of one without torchrun.

    host, port: of the rendezvous store, which torchrun's agent holds (agent_holds_store) or rank 0.
    attempt: how often torchrun has restarted the ranks.  fault: MLITE_FAULT, see train/ending/faults.py.
    noun: what is counted; a launcher counts hosts.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    host: str = ""
    port: int = 0
    agent_holds_store: bool = False
    attempt: int = 0
    fault: str | None = None
    noun: str = "rank"


def read_launch() -> Launch:
    """Everything the environment says; raises ConfigError where it contradicts itself."""
    fault = os.environ.get("MLITE_FAULT") or None
    given = {n: os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if n in os.environ}
    if "RANK" not in given and "WORLD_SIZE" not in given:
        refused = alone_among_many()
        if refused is not None:
            raise ConfigError(refused)
        return Launch(fault=fault)
    if not {"RANK", "WORLD_SIZE"} <= given.keys():
        raise ConfigError(
            f"the environment has {sorted(given)} but RANK and WORLD_SIZE belong together; start "
            "with `python -m torch.distributed.run`, or unset them for one process"
        )
    rank, world_size = _number("RANK"), _number("WORLD_SIZE")
    if rank >= world_size:
        raise ConfigError(
            f"RANK={rank} is not below WORLD_SIZE={world_size}; ranks count from 0 - start with "
            "`python -m torch.distributed.run`, which numbers them"
        )
    missing = [n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing and world_size > 1:
        raise ConfigError(
            f"{' and '.join(missing)} are not set in the environment: name the host and port of "
            "rank 0, or start with `python -m torch.distributed.run`, which sets them"
        )
    port = _number("MASTER_PORT", "0")
    if world_size > 1 and not 0 < port < 1 << 16:
        raise ConfigError(f"MASTER_PORT={port} is no port: choose one from 1024 to 65535")
    return Launch(
        rank,
        world_size,
        local_rank=_number("LOCAL_RANK", str(rank)),
        # DeepSpeed's launcher says LOCAL_SIZE
        local_world_size=max(_number("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")), 1),
        host=os.environ.get("MASTER_ADDR", ""),
        port=port,
        agent_holds_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number("TORCHELASTIC_RESTART_COUNT", "0"),
        fault=fault,
    )


def _number(name: str, otherwise: str = "") -> int:
    text = os.environ.get(name, otherwise)
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(
            f"{name}={text!r} in the environment is not a number from 0 on - start with "
            "`python -m torch.distributed.run`, which sets it"
        )
    return int(text)


def choose_device(launch: Launch, *, use_cpu: bool, backend: str | None) -> torch.device:
    """The GPU of this local rank, or the CPU where there is none, it was asked for, or gloo was."""
    if use_cpu or backend == "gloo" or not torch.cuda.is_available():
        if backend == "nccl" and not use_cpu:
            raise ConfigError(
                "--distributed-backend nccl needs a GPU; here use gloo, or leave it out"
            )
        return torch.device("cpu")
    there = torch.cuda.device_count()
    # NCCL 2.30 and newer allow several ranks on one GPU where this is set; without it they refuse
    shared = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    if launch.local_rank >= there and not shared:
        raise ConfigError(
            f"local rank {launch.local_rank} has no GPU: this node has {there}; "
            "set GPUS_PER_NODE (torchrun's --nproc_per_node) to that"
        )
    device = torch.device("cuda", launch.local_rank % there)
    torch.cuda.set_device(device)
    return device


def set_device_environment(
    parallel: ParallelConfig, *, use_cpu: bool, deterministic: bool = False
) -> list[str]:
    """What CUDA and NCCL read from the environment once, when they start; returns notices for a GPU.

    To be called before anything asks CUDA, choose_device() included: the flags alone decide.  What
    is set already is the user's and stays.  deterministic: a fixed workspace for cuBLAS, and for
    NCCL an algorithm that adds in one order.
    """
    if use_cpu or parallel.distributed_backend == "gloo":
        return []
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
    if parallel.tp * parallel.cp == 1:
        return []
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if name in os.environ:
        asked = os.environ[name]
        return [] if asked == "1" else [f"{name}={asked}, as set in the environment"]
    if torch.cuda.is_initialized():
        return [f"{name} is not set, and CUDA has started: tensor-parallel overlap may be less"]
    os.environ[name] = "1"
    return [f"{name} set to 1: tensor-parallel overlap needs it"]


@dataclass(frozen=True, slots=True)
class World:
    """All ranks have joined: the store they share (None for one process), and their heartbeats."""

    presence: Presence
    store: Store | None = None
    prefix: str = ""


def gather_ranks(launch: Launch, parallel: ParallelConfig, *, end: Callable[[str], None]) -> World:
    """Wait for all ranks and start heartbeats; `end` ends this process with a verdict.

    Raises DistributedError naming the ranks that did not come within the timeout, ConfigError
    where two processes have the same rank.
    """
    if launch.world_size == 1:
        return World(Alone())
    seconds = parallel.distributed_timeout_minutes * 60.0
    began = time.monotonic()
    prefix = f"megatron_lite/{launch.attempt}"
    hosts = launch.rank == 0 and not launch.agent_holds_store
    store = _open_store(launch, seconds, hosts=hosts)
    liveness = Liveness(
        _connect(launch, seconds),
        prefix=prefix,
        rank=launch.rank,
        world_size=launch.world_size,
        limits=Limits.from_timeout(seconds),
        hosts_store=hosts,
        beside_store=launch.agent_holds_store and launch.rank < launch.local_world_size,
        holder=f"rank 0's host ({launch.host}), whose launcher holds the store,"
        if launch.agent_holds_store else "rank 0, which holds the store,",
        end=end,
    )  # fmt: skip
    try:
        liveness.announce()
        if (
            launch.rank == 0
        ):  # before anybody proceeds: NCCL's watchdog of an attempt before left it,
            store.delete_key(_NCCL_FAILED)  # and would end this one after its heartbeat timeout
        missing = roll_call(
            store,
            prefix=prefix,
            rank=launch.rank,
            world_size=launch.world_size,
            seconds=max(seconds - (time.monotonic() - began), 1.0),
            remind=_reminder(launch, seconds).missing,
        )
    except ValueError as error:
        raise ConfigError(f"{error}: give every process its own RANK") from error
    except RuntimeError as error:
        raise _cannot_join(
            launch, seconds, f"the store broke off ({_first_line(error)})"
        ) from error
    if missing:
        raise _cannot_join(launch, seconds, _came(launch, missing))
    liveness.start()
    return World(liveness, store, prefix)


def gather_hosts(hosts: Launch, seconds: float) -> Store:
    """Wait, in a launcher, until the launchers of all hosts have come; keep what it returns.

    hosts: rank, world_size and noun count hosts.  The store is the one that torchrun then uses:
    one process may open it twice.  Raises DistributedError naming the hosts that did not come
    within the seconds, ConfigError where two say they are the same.
    """
    store = _open_store(hosts, seconds, hosts=hosts.rank == 0, shared=True)
    try:
        missing = roll_call(
            store,
            prefix="megatron_lite/hosts",
            rank=hosts.rank,
            world_size=hosts.world_size,
            seconds=seconds,
            remind=_reminder(hosts, seconds).missing,
        )
    except ValueError as error:
        what = f"two launchers say they are {hosts.noun} {hosts.rank}"
        raise ConfigError(f"{what}: give every host its own NODE_RANK (--node_rank)") from error
    except RuntimeError as error:
        what = f"the store broke off ({_first_line(error)})"
        raise _cannot_join(hosts, seconds, what) from error
    if missing:
        raise _cannot_join(hosts, seconds, _came(hosts, missing))
    return store


def _came(launch: Launch, missing: list[int]) -> str:
    came = launch.world_size - len(missing)
    shown = numbers(missing)
    return f"{came} of {launch.world_size} {launch.noun}s came, missing: {launch.noun} {shown}"


def compare_ranks(launch: Launch, world: World, facts: dict[str, str]) -> None:
    """Raise ConfigError, on every rank alike, where the ranks do not agree on the facts."""
    if world.store is None:
        return
    lines = fact_differences(
        world.store,
        facts,
        prefix=world.prefix,
        rank=launch.rank,
        world_size=launch.world_size,
    )
    if lines:
        listed = "".join(f"\n  {line}" for line in lines[:20])
        more = f"\n  and {len(lines) - 20} more" if lines[20:] else ""
        raise ConfigError(
            f"the ranks were not started alike:{listed}{more}\ngive every rank the same flags, files "
            "and version"
        )


def from_rank_0(launch: Launch, world: World, find: Callable[[], str]) -> str:
    """What rank 0 finds, on every rank.  Collective over the world; needs no process group."""
    if world.store is None:
        return find()
    key = f"{world.prefix}/from-rank-0"
    if launch.rank == 0:
        world.store.set(key, find())
    while not world.store.check(
        [key]
    ):  # as long as it takes: the watch ends a wait for a lost rank
        time.sleep(0.02)
    return bytes(world.store.get(key)).decode()


def wait_for_all(world: World, name: str, world_size: int) -> None:
    """Return when all ranks have come here, however long one of them works before it.

    A collective would end everybody after --distributed-timeout-minutes; here the watch over the
    ranks decides: who is lost, or no longer gets on, ends the wait.  name: once per run.
    """
    if world.store is None:
        return
    key = f"{world.prefix}/all/{name}"
    come, pause = world.store.add(key, 1), 0.01
    while come < world_size:
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
        come = world.store.add(key, 0)


def start_process_group(
    launch: Launch, parallel: ParallelConfig, device: torch.device, world: World
) -> None:
    """Join the process group over the gathered ranks; raises DistributedError."""
    if world.store is None:
        return
    backend = parallel.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    seconds = parallel.distributed_timeout_minutes * 60.0
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore(f"{world.prefix}/group", world.store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=seconds),
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            world.presence.explain(f"{backend} could not start: {_first_line(error)}")
        ) from error


def _open_store(launch: Launch, seconds: float, *, hosts: bool, shared: bool = False) -> Store:
    if not hosts:
        return _connect(launch, seconds)
    try:
        return _tcp_store(launch, seconds, is_master=True, shared=shared)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"{launch.noun} 0 cannot listen on port {launch.port}: {_first_line(error)} - is another run "
            "using it? - choose another MASTER_PORT (torchrun's --master-port)"
        ) from error


def _connect(launch: Launch, seconds: float) -> Store:
    """A connection to the store, tried until the time is over; a signal is heard in between."""
    end = time.monotonic() + seconds
    _wait_for_port(launch, end, seconds)
    try:
        store = _tcp_store(launch, max(end - time.monotonic(), 1.0), is_master=False)
    except (RuntimeError, ValueError) as error:
        raise _cannot_join(launch, seconds, _first_line(error)) from error
    store.set_timeout(timedelta(seconds=seconds))
    return store


def _reminder(launch: Launch, seconds: float) -> Reminder:
    """Hosts are started one by one, ranks together: ranks are waited for silently at first."""
    return Reminder(
        launch.noun,
        launch.rank,
        launch.world_size,
        f"{launch.host}:{launch.port}",
        seconds,
        after=0.0 if launch.noun == "host" else 5.0,
        silent=launch.local_rank > 0,
    )


def _wait_for_port(launch: Launch, end: float, seconds: float) -> None:
    """torch's client logs every refusal with a stack; knocking first keeps a slow start quiet."""
    reminder = _reminder(launch, seconds)
    while True:
        try:
            socket.create_connection((launch.host, launch.port), timeout=2.0).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                what = f"nobody answers there ({error}): {launch.noun} 0, which holds the store, is missing"
                raise _cannot_join(launch, seconds, what) from error
            reminder.say(f"nobody answers there yet ({error})")
        time.sleep(0.05)


def _tcp_store(launch: Launch, seconds: float, *, is_master: bool, shared: bool = False) -> Store:
    return TCPStore(
        launch.host,
        launch.port,
        launch.world_size,
        is_master=is_master,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=shared,
    )


def _cannot_join(launch: Launch, seconds: float, what: str) -> DistributedError:
    return DistributedError(
        f"{launch.noun} {launch.rank} of {launch.world_size} could not join at {launch.host}:{launch.port} "
        f"within {seconds / 60:g} minutes: {what} - start every node with the same MASTER_ADDR and "
        "MASTER_PORT and its own NODE_RANK, or raise --distributed-timeout-minutes"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def stop_process_group() -> None:
    """Leave the world, if joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
