"""DATASETS: each kind of dataset, how it is built and what a sample of it looks like."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.objectives import OBJECTIVES
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.build import Datasets, build_datasets
from megatron_lite.data.provenance import MadeWith
from megatron_lite.data.samples import Sample


class BuildDatasets(Protocol):
    """Opens what each split reads; a split of which 0 samples are asked for is None.

    Called on one rank per node first; it reads no device and asks no other rank.
    """

    def __call__(
        self,
        data: DataConfig,
        /,
        *,
        seq_length: int,
        seed: int,
        train_samples: int | None,
        valid_samples: int | None,
        test_samples: int | None,
        vocab_size: int | None,
        eod: int | None,
        cache_folder: str | os.PathLike[str] | None,
        tokenizer: MadeWith | None,
    ) -> Datasets: ...


@dataclass(frozen=True, slots=True)
class DatasetKind:
    """How datasets of one kind are built, and their form before there are any.

    example: --seq-length -> a sample of any values; a rehearsal takes it for all of a run's.
    """

    build: BuildDatasets
    example: Callable[[int], Sample]


def _zeros(seq_length: int) -> Sample:
    return Sample(np.zeros(seq_length + 1, dtype=np.int64))


DATASETS: dict[str, DatasetKind] = {
    # token files by the Megatron flags, or --mock-data
    "pretrain": DatasetKind(build_datasets, _zeros),
}
"""By the name that an objective asks for (config/objectives.py)."""


def kind_for(objective: str) -> DatasetKind:
    """What an objective is trained on; raises ConfigError where it names no row of DATASETS."""
    name = OBJECTIVES[objective].dataset
    if name not in DATASETS:
        raise ConfigError(
            f"--objective {objective} is trained on the dataset {name!r}, which is no row of DATASETS "
            f"(it has {', '.join(DATASETS)}) - add one where the objective is added"
        )
    return DATASETS[name]
