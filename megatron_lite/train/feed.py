"""Batches from numpy to the device: every rank reads its own, nothing is broadcast."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_lite.data.batch import Batch
from megatron_lite.kernels.segments import Segments
from megatron_lite.layers.contexts import ForwardContext, StepDropout
from megatron_lite.pipeline.stage import MicroBatch


def permutation(size: int, seed: int) -> npt.NDArray[np.int64]:
    """torch's permutation of so many numbers on the CPU: what Megatron's cyclic order is made of."""
    numbers: npt.NDArray[np.int64] = torch.randperm(
        size, generator=torch.Generator().manual_seed(seed)
    ).numpy()
    return numbers


def to_device(
    batch: Batch, device: torch.device, *, dropout: StepDropout | None = None
) -> MicroBatch:
    """[b, s+1] tokens on the host -> tokens and labels [s, b] on the device, and all that goes with them.

    dropout: the training step's; None in evaluation.
    """
    host = torch.from_numpy(batch.tokens)
    if device.type == "cuda":
        host = host.pin_memory()
    tokens = host.to(device, non_blocking=True).t().contiguous()  # [s + 1, b]
    mask = _columns(batch.loss_mask, device)
    positions = ForwardContext(
        samples=_sent(batch.sample_numbers, device),
        index=torch.arange(tokens.shape[0] - 1, device=device),
        first_sample=int(batch.sample_numbers[0]),
        dropout=dropout,
        segments=_segments(batch, device),
        restarted=None if batch.positions is None else _columns(batch.positions, device),
    )
    extras = {name: _sent(values, device) for name, values in batch.extras.items()}
    return MicroBatch(tokens[:-1], tokens[1:], mask, positions, extras)


def _sent(values: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def _columns(rows: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """[b, s] on the host -> [s, b] on the device."""
    return _sent(rows, device).t().contiguous()


def _segments(batch: Batch, device: torch.device) -> Segments | None:
    if batch.segments is None:
        return None
    rows, length = batch.loss_mask.shape
    return Segments(_sent(batch.segments, device), batch.longest_segment, rows, length)
