"""What is asked of the device itself: its name, its peak, its memory."""

from __future__ import annotations

import torch

from megatron_lite.telemetry.throughput import peak_tflops


def device_peak(device: torch.device) -> float | None:
    """Dense bf16 TFLOP/s of the device, None where it is not known (a CPU, say)."""
    return peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


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
