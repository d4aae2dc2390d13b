"""Tiny configurations and deterministic batches for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from megatron_lite.blueprint.draw_up import Blueprint, draw_up
from megatron_lite.config.objectives import SFT
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.data.batch import Batch, collate
from megatron_lite.data.sampler import sample_numbers
from megatron_lite.data.samples import Sample
from megatron_lite.parallel.context import ParallelContext
from tests.support.sizes import changed


def tiny_config(**changes: Any) -> RunConfig:
    """RunConfig of a 4-layer model; changes as section__field=value."""
    config = RunConfig()
    wanted = changed(**changes)
    return dataclasses.replace(
        config,
        **{s: dataclasses.replace(getattr(config, s), **f) for s, f in wanted.items()},
    )


def context(blueprint: Blueprint, rank: int, device: torch.device | str = "cpu") -> ParallelContext:
    """The context of this rank of the process group (serial for one)."""
    if blueprint.grid.world_size == 1:
        return ParallelContext.serial(device)
    return ParallelContext.from_grid(blueprint.grid, rank, torch.device(device))


def make_batches(
    config: RunConfig, blueprint: Blueprint, dp_rank: int, step: int, *, ragged: bool = False
) -> list[Batch]:
    """This dp rank's micro batches of a step: tokens are a function of the sample number."""
    gbs = config.train.global_batch_size
    assert gbs is not None
    micro, count = config.train.micro_batch_size, blueprint.microbatches(gbs)
    numbers = sample_numbers(step * gbs, micro, count, dp_rank, blueprint.grid.dp)
    return [_batch(config, row, ragged) for row in numbers]


def _batch(config: RunConfig, numbers: np.ndarray, ragged: bool) -> Batch:
    s, vocab = config.model.seq_length, config.model.vocab_size
    tokens = np.stack(
        [np.random.default_rng(int(n)).integers(0, vocab, s + 1) for n in numbers]
    ).astype(np.int64)
    if config.train.objective == SFT:
        return collate(
            [_tuned(row, int(n)) for row, n in zip(tokens, numbers, strict=True)], numbers
        )
    mask = np.ones((len(numbers), s), dtype=np.float32)
    if ragged:
        for row, n in zip(mask, numbers, strict=True):
            row[int(n) % s :] = 0.0
    return Batch(tokens, numbers, mask)


def _tuned(tokens: np.ndarray, number: int) -> Sample:
    """Two samples and what fills the row; the ends of both are learned, of each fifth row nothing."""
    length = len(tokens) - 1
    first, second = 4 + number % 3, 11 + number % 4
    mask = np.zeros(length, np.float32)
    if number % 5 != 4:
        mask[first - 3 : first - 1] = mask[second - 4 : second - 1] = 1.0
    return Sample(tokens, mask, np.array([0, first, second, length], np.int32))


def draw(config: RunConfig, world_size: int) -> Blueprint:
    """The blueprint of a tiny run."""
    return draw_up(config, world_size)
