"""Batches and numbers from the host to the device: every rank reads its own, nothing is broadcast.

On a GPU all copies are from pinned memory: one from other memory stops the host until the device has
done everything before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_lite.data.batch import Batch
from megatron_lite.kernels.segments import Segments
from megatron_lite.layers.contexts import ForwardContext, StepDropout, StepNoise
from megatron_lite.layers.stretching import StepStretch
from megatron_lite.pipeline.stage import MicroBatch


def permutation(size: int, seed: int) -> npt.NDArray[np.int64]:
    """torch's permutation of so many numbers on the CPU: what Megatron's cyclic order is made of."""
    numbers: npt.NDArray[np.int64] = torch.randperm(
        size, generator=torch.Generator().manual_seed(seed)
    ).numpy()
    return numbers


def to_device(
    batch: Batch,
    device: torch.device,
    *,
    training: bool = False,
    dropout: StepDropout | None = None,
    noise: StepNoise | None = None,
    stretch: StepStretch | None = None,
) -> MicroBatch:
    """[b, s+1] tokens on the host -> tokens and labels [s, b] on the device, and all that goes with them.

    training: whether it is for a training step.  dropout, noise, stretch: the step's; None in evaluation.
    """
    tokens = _columns(batch.tokens, device)  # [s + 1, b]
    mask = _columns(batch.loss_mask, device)
    restarted = None if batch.positions is None else _columns(batch.positions, device)
    if stretch is not None:
        restarted = stretch.positions if restarted is None else stretch.positions[restarted]
    positions = ForwardContext(
        samples=_sent(batch.sample_numbers, device),
        index=torch.arange(tokens.shape[0] - 1, device=device),
        first_sample=int(batch.sample_numbers[0]),
        training=training,
        dropout=dropout,
        noise=noise,
        segments=_segments(batch, device),
        restarted=restarted,
        length=None if stretch is None else stretch.length,
    )
    extras = {name: _sent(values, device) for name, values in batch.extras.items()}
    return MicroBatch(tokens[:-1], tokens[1:], mask, positions, extras)


def pinned_on(device: torch.device) -> Callable[[Batch], Batch] | None:
    """What a loader's threads do to each micro batch: into pinned memory, whole; None on a CPU."""
    if device.type != "cuda":
        return None

    def pin(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        kept: np.ndarray[Any, Any] = torch.from_numpy(array).pin_memory().numpy()
        return kept

    def pinned(batch: Batch) -> Batch:
        found = {f.name: getattr(batch, f.name) for f in fields(batch)}
        arrays = {k: pin(v) for k, v in found.items() if isinstance(v, np.ndarray)}
        extras = {name: pin(values) for name, values in batch.extras.items()}
        return replace(batch, **arrays, extras=extras)

    def on_this_device(batch: Batch) -> Batch:
        with torch.cuda.device(device):  # a thread begins on device 0
            return pinned(batch)

    return on_this_device


def numbers_to_device(numbers: Sequence[float], device: torch.device) -> torch.Tensor:
    """fp64 [n] on the device, in one copy that does not wait for it."""
    host = torch.tensor(numbers, dtype=torch.float64)
    return _to(host, device)


def _sent(values: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    return _to(torch.from_numpy(values), device)


def _to(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and not host.is_pinned():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _columns(rows: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """[b, s] on the host -> [s, b] on the device."""
    return _sent(rows, device).t().contiguous()


def _segments(batch: Batch, device: torch.device) -> Segments | None:
    if batch.segments is None:
        return None
    rows, length = batch.loss_mask.shape
    return Segments(_sent(batch.segments, device), batch.longest_segment, rows, length)
