"""Process group, device and threads of this process; the only reader of RANK and WORLD_SIZE."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_lite.config.errors import ConfigError, DistributedError
from megatron_lite.config.parallel import ParallelConfig


@dataclass(frozen=True, slots=True)
class Launch:
    """Who this process is, as torchrun says it; alone without torchrun."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    under_torchrun: bool = False


def read_launch() -> Launch:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; raises ConfigError where they contradict."""
    given = {n: os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if n in os.environ}
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return Launch()
    if not {"RANK", "WORLD_SIZE"} <= given.keys():
        raise ConfigError(
            f"the environment has {sorted(given)} but RANK and WORLD_SIZE belong together; start "
            "with `python -m torch.distributed.run`, or unset them for one process"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name, given.get("RANK" if name == "LOCAL_RANK" else name, "1"))
        if not text.isdigit():
            raise ConfigError(f"{name}={text!r} in the environment is not a number from 0 on")
        numbers[name] = int(text)
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise ConfigError(
            f"RANK={numbers['RANK']} is not below WORLD_SIZE={numbers['WORLD_SIZE']}; ranks count "
            "from 0"
        )
    missing = [n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing and numbers["WORLD_SIZE"] > 1:
        raise ConfigError(
            f"{' and '.join(missing)} are not set in the environment: name the host and port of "
            "rank 0, or start with `python -m torch.distributed.run`, which sets them"
        )
    return Launch(
        numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"],
        max(numbers["LOCAL_WORLD_SIZE"], 1), under_torchrun=True,
    )  # fmt: skip


def choose_device(launch: Launch, *, use_cpu: bool, backend: str | None) -> torch.device:
    """The GPU of this local rank, or the CPU where there is none, it was asked for, or gloo was."""
    if use_cpu or backend == "gloo" or not torch.cuda.is_available():
        if backend == "nccl" and not use_cpu:
            raise ConfigError(
                "--distributed-backend nccl needs a GPU; here use gloo, or leave it out"
            )
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {launch.local_rank} has no GPU: this node has {torch.cuda.device_count()}; "
            "set GPUS_PER_NODE (torchrun's --nproc_per_node) to that"
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


def set_device_environment(parallel: ParallelConfig, device: torch.device) -> list[str]:
    """What CUDA reads from the environment, before it starts; returns notices."""
    if device.type != "cuda" or parallel.tp * parallel.cp == 1:
        return []
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        return []
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return ["CUDA_DEVICE_MAX_CONNECTIONS set to 1: tensor-parallel overlap needs it"]


def start_process_group(launch: Launch, parallel: ParallelConfig, device: torch.device) -> None:
    """Join the world; raises DistributedError when not all ranks come within the timeout."""
    if launch.world_size == 1:
        return
    backend = parallel.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    try:
        dist.init_process_group(
            backend,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(minutes=parallel.distributed_timeout_minutes),
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        host, port = (os.environ.get(n, "?") for n in ("MASTER_ADDR", "MASTER_PORT"))
        raise DistributedError(
            f"rank {launch.rank} of {launch.world_size} could not join at {host}:{port} within "
            f"{parallel.distributed_timeout_minutes:g} minutes: {error} - check that every node was "
            "started with the same MASTER_ADDR and MASTER_PORT and its own NODE_RANK"
        ) from error


def stop_process_group() -> None:
    """Leave the world, if joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
