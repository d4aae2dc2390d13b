"""Facts of the device itself: its name, its peak, its memory."""

from __future__ import annotations

import os

import torch

from megatron_lite.blueprint.devices import peak_tflops, unknown_peak_line
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.config.sections.telemetry import TelemetryConfig


def device_peak(device: torch.device) -> float | None:
    """Dense bf16 TFLOP/s of the device, None where it is not known (a CPU, say)."""
    return peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_notices(device: torch.device) -> list[str]:
    """A line where a GPU's peak is not known."""
    if device.type != "cuda":
        return []
    line = unknown_peak_line(torch.cuda.get_device_name(device))
    return [] if line is None else [line]


def cpu_notices(
    precision: PrecisionConfig, telemetry: TelemetryConfig, device: torch.device
) -> list[str]:
    """One line for each setting that is about a GPU and changes nothing on a CPU."""
    if device.type == "cuda":
        return []
    given = {
        "--tf32": precision.tf32,
        "--log-memory-to-tensorboard": telemetry.log_memory_to_tensorboard,
        "--profile --no-use-pytorch-profiler": (
            telemetry.profile and not telemetry.use_pytorch_profiler
        ),
    }
    return [f"{flag}: changes nothing on a CPU" for flag, on in given.items() if on]


def be_deterministic() -> None:
    """--deterministic-mode: only kernels that give the same bits every time.

    An operator without such a kernel raises torch's RuntimeError, which names it.
    """
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def share_cores(ranks_here: int, device: torch.device) -> None:
    """Give what a rank computes on the host beside its GPU its share of the host's cores.

    torchrun leaves a rank one thread.
    """
    if device.type != "cuda":
        return
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    torch.set_num_threads(max(torch.get_num_threads(), cores // ranks_here))


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory allocated so far; None without an accelerator."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def memory_line(device: torch.device, *, rank: int, iterations: int) -> str | None:
    """Megatron's memory report, in its words and units of 2^20 bytes; None without an accelerator."""
    if device.type != "cuda":
        return None
    values = {
        "allocated": torch.cuda.memory_allocated(device),
        "max allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "max reserved": torch.cuda.max_memory_reserved(device),
    }
    shown = " | ".join(f"{name}: {value / 2**20:.2f}" for name, value in values.items())
    return f"[Rank {rank}] (after {iterations} iterations) memory (MB) | {shown}"
