"""Layers -> stages -> pp ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.parallel import ParallelConfig

Placement = tuple[int, ...]
"""placement[stage] is the pp rank that holds the stage."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of layers that one pp rank computes in one go; layers carry their global numbers."""

    index: int
    layers: tuple[int, ...]
    has_embedding: bool
    has_head: bool


def round_robin(pp: int, num_chunks: int = 1) -> Placement:
    """Chunk c of pp rank r holds stage c * pp + r."""
    return tuple(range(pp)) * num_chunks


def layers_per_stage(num_layers: int, num_stages: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """How many layers each stage gets: the same number each.

    Raises ConfigError where that does not come out even, naming what would.
    """
    for flag in (
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "pipeline_model_parallel_layout",
    ):
        if getattr(parallel, flag):
            raise ConfigError(
                f"--{flag.replace('_', '-')} {getattr(parallel, flag)}: stages of different sizes "
                "are not built yet; leave it out and every stage gets as many layers"
            )
    if num_layers < 1 or num_layers % num_stages:
        fitting = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
        raise ConfigError(
            f"--num-layers {num_layers} cannot be dealt evenly to {num_stages} pipeline stages; "
            f"choose --pipeline-model-parallel-size from {fitting}"
        )
    return (num_layers // num_stages,) * num_stages


def cut_stages(counts: Sequence[int]) -> tuple[Stage, ...]:
    """Stages of so many layers each; the embedding before the first, the head after the last."""
    stages, start = [], 0
    for index, count in enumerate(counts):
        stages.append(
            Stage(
                index=index,
                layers=tuple(range(start, start + count)),
                has_embedding=index == 0,
                has_head=index == len(counts) - 1,
            )
        )
        start += count
    return tuple(stages)
