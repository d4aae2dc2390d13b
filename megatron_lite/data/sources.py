"""DATASETS: each kind of dataset, how it is built and what a sample of it looks like."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_lite.config.blend import named_prefixes
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.objectives import OBJECTIVES
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.build import Datasets, build_datasets
from megatron_lite.data.forms import SampleForm
from megatron_lite.data.masks import MaskedDataset
from megatron_lite.data.overview import overview
from megatron_lite.data.provenance import MadeWith
from megatron_lite.data.samples import Sample
from megatron_lite.data.taught import taught
from megatron_lite.data.tuning import TuningPlan, nothing_learned


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


def build_tuning(
    data: DataConfig, /, *, seq_length: int, eod: int | None, **asked: Any
) -> Datasets:
    """Rows of samples with a mask: what tools/preprocess_data.py --chat writes."""
    draw_up = functools.partial(TuningPlan.draw_up, packing=data.sft_packing, pad=eod or 0)
    form = SampleForm(MaskedDataset, draw_up, nothing_learned)
    return build_datasets(data, seq_length=seq_length, eod=eod, form=form, **asked)


def _answers(seq_length: int) -> Sample:
    """A sample of two segments, the second half of which is learned."""
    half = (seq_length + 1) // 2
    borders = [0, half, seq_length] if half < seq_length else [0, seq_length]
    mask = (np.arange(seq_length) >= half).astype(np.float32)
    return Sample(np.zeros(seq_length + 1, np.int64), mask, np.array(borders, np.int32))


DATASETS: dict[str, DatasetKind] = {
    # token files by the Megatron flags, or --mock-data
    "pretrain": DatasetKind(build_datasets, _zeros),
    # the same with a loss mask beside them
    "tuning": DatasetKind(build_tuning, _answers),
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


def what_counts(
    data: DataConfig, *, seq_length: int, seed: int, **samples: int | None
) -> list[str]:
    """How many tokens of a run's samples count, in lines; nothing is written.  samples: of each split."""
    elsewhere = next((p for p in named_prefixes(data) if not MaskedDataset.exists(p)), None)
    if elsewhere is not None:
        return [
            f"NOTE: {elsewhere} is not on this machine: how many tokens count is not known here"
        ]
    taught(data)
    found = build_tuning(
        data, seq_length=seq_length, seed=seed, vocab_size=None, eod=None, cache_folder=None,
        tokenizer=None, **samples,
    )  # fmt: skip
    return [*overview(found), *found.notices]
