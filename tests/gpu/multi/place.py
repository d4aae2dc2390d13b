"""Where the bodies of this folder run: NCCL, one GPU a rank; and gloo on the CPU, so that they are tried.

With NCCL_MULTI_RANK_GPU_ENABLE=1 (NCCL 2.30 and newer) ranks share the GPUs that are there.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.rendezvous.launch import (
    choose_device,
    gather_ranks,
    read_launch,
    start_process_group,
)

NCCL, GLOO = "nccl", "gloo"


def places(ranks: int, name: str, *values: object, twin: str = "ci") -> list[Any]:
    """Two parameters of a test: gloo, marked as `twin` says, and NCCL where there are so many GPUs."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        there *= 8
    few = pytest.mark.skipif(there < ranks, reason=f"needs {ranks} GPUs, there are {there}")
    return [
        pytest.param(GLOO, *values, marks=getattr(pytest.mark, twin), id=f"{name}-gloo"),
        pytest.param(NCCL, *values, marks=[pytest.mark.gpu, few], id=f"{name}-nccl"),
    ]


def join(place: str) -> torch.device:
    """Join the process group as the trainer does, with torchrun's environment; spawn(..., join=False)."""
    torch.backends.cuda.matmul.allow_tf32 = False
    launch = read_launch()
    device = choose_device(launch, use_cpu=place == GLOO, backend=place)
    world = gather_ranks(launch, ParallelConfig(), end=print)
    start_process_group(launch, ParallelConfig(distributed_backend=place), device, world)
    return device


def tool_flags(place: str) -> list[str]:
    """What tools/pretrain_gpt.py needs to run there."""
    return ["--use-cpu"] if place == GLOO else ["--distributed-backend", NCCL]
