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
