"""Batches from numpy to the device: every rank reads its own, nothing is broadcast."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_lite.data.batch import Batch
from megatron_lite.layers.contexts import ForwardContext
from megatron_lite.pipeline.stage import MicroBatch


def permutation(size: int, seed: int) -> npt.NDArray[np.int64]:
    """torch's permutation of so many numbers on the CPU: what Megatron's cyclic order is made of."""
    numbers: npt.NDArray[np.int64] = torch.randperm(
        size, generator=torch.Generator().manual_seed(seed)
    ).numpy()
    return numbers


def to_device(batch: Batch, device: torch.device, *, step: int, training: bool) -> MicroBatch:
    """[b, s+1] tokens on the host -> tokens and labels [s, b] on the device."""
    host = torch.from_numpy(batch.tokens)
    if device.type == "cuda":
        host = host.pin_memory()
    tokens = host.to(device, non_blocking=True).t().contiguous()  # [s + 1, b]
    mask = _columns(batch.loss_mask, device)
    positions = ForwardContext(
        samples=torch.from_numpy(batch.sample_numbers).to(device, non_blocking=True),
        index=torch.arange(tokens.shape[0] - 1, device=device),
        step=step,
        training=training,
        mask=None if batch.documents is None else _same_document(batch.documents, device),
        restarted=None if batch.positions is None else _columns(batch.positions, device),
    )
    return MicroBatch(tokens[:-1], tokens[1:], mask, positions)


def _columns(rows: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """[b, s] on the host -> [s, b] on the device."""
    return torch.from_numpy(rows).to(device, non_blocking=True).t().contiguous()


def _same_document(documents: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """[b, s] numbers of documents -> bool [b, 1, s, s]: both tokens are of one document."""
    number = torch.from_numpy(documents).to(device, non_blocking=True)
    return (number[:, :, None] == number[:, None, :])[:, None]
