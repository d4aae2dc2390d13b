"""DATASETS: each kind of dataset, how it is built and what a sample of it looks like."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from megatron_lite.config.blend import data_sources, named_prefixes
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.objectives import OBJECTIVES
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.config.sections.train import TrainConfig
from megatron_lite.data.build import Datasets, build_datasets, samples_of_an_epoch
from megatron_lite.data.forms import STREAM, SampleForm
from megatron_lite.data.masks import MaskedDataset
from megatron_lite.data.overview import overview
from megatron_lite.data.provenance import MadeWith
from megatron_lite.data.samples import Sample
from megatron_lite.data.taught import taught
from megatron_lite.data.tuning import TuningPlan, nothing_learned

_COUNTED = 1 << 17
"""Samples of a split that a dry run puts in order: a second or a few, however long the run is."""

_MOST_SAMPLES = 1 << 36
"""Of all epochs together: their order alone is 512 GiB."""


class BuildDatasets(Protocol):
    """Opens what each split reads; a split of which 0 samples are asked for is None.

    Called on one rank per node first; it reads no device and asks no other rank.  repeats: given to
    kinds with a `form` alone, for --train-epochs.
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
        repeats: bool = False,
    ) -> Datasets: ...


@dataclass(frozen=True, slots=True)
class DatasetKind:
    """How datasets of one kind are built, and their form before there are any.

    example: --seq-length -> a sample of any values; a rehearsal takes it for all of a run's.
    form: how samples are made of a file, by which --train-epochs counts them; None: it cannot.
    """

    build: BuildDatasets
    example: Callable[[int], Sample]
    form: Callable[[DataConfig], SampleForm] | None = None


def _zeros(seq_length: int) -> Sample:
    return Sample(np.zeros(seq_length + 1, dtype=np.int64))


def _tuning_form(data: DataConfig, eod: int | None = None) -> SampleForm:
    draw_up = functools.partial(TuningPlan.draw_up, packing=data.sft_packing, pad=eod or 0)
    return SampleForm(MaskedDataset, draw_up, nothing_learned)


def build_tuning(
    data: DataConfig, /, *, seq_length: int, eod: int | None, **asked: Any
) -> Datasets:
    """Rows of samples with a mask: what tools/preprocess_data.py --chat writes."""
    form = _tuning_form(data, eod)
    return build_datasets(data, seq_length=seq_length, eod=eod, form=form, **asked)


def _answers(seq_length: int) -> Sample:
    """A sample of two segments, the second half of which is learned."""
    half = (seq_length + 1) // 2
    borders = [0, half, seq_length] if half < seq_length else [0, seq_length]
    mask = (np.arange(seq_length) >= half).astype(np.float32)
    return Sample(np.zeros(seq_length + 1, np.int64), mask, np.array(borders, np.int32))


DATASETS: dict[str, DatasetKind] = {
    # token files by the Megatron flags, or --mock-data
    "pretrain": DatasetKind(build_datasets, _zeros, lambda data: STREAM),
    # the same with a loss mask beside them
    "tuning": DatasetKind(build_tuning, _answers, _tuning_form),
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


def with_epochs(data: DataConfig, train: TrainConfig, *, seq_length: int) -> TrainConfig:
    """--train-epochs with the samples of one, counted; as it is without, or where a plan's files are not here.

    Raises ConfigError where nothing says what an epoch is, or --epoch-samples something else.
    """
    if train.train_epochs is None or (train.needs_no_data and _elsewhere(data)):
        return train
    kind = kind_for(train.objective)
    if kind.form is None:
        raise ConfigError(
            f"--train-epochs {train.train_epochs}: the dataset of --objective {train.objective} has no "
            "'form' (data/sources.py) by which an epoch is counted; give --train-iters or --train-samples"
        )
    found = samples_of_an_epoch(data, seq_length=seq_length, seed=train.seed, form=kind.form(data))
    if train.epoch_samples not in (None, found):
        raise ConfigError(
            f"--epoch-samples {train.epoch_samples}, and an epoch of the data here is {found} samples of "
            f"--seq-length {seq_length}: leave it out"
        )
    if train.train_epochs * found > _MOST_SAMPLES:
        raise ConfigError(
            f"--train-epochs {train.train_epochs} of {found} samples are more than {_MOST_SAMPLES:,} samples, "
            f"whose order no memory holds; give at most {_MOST_SAMPLES // found}"
        )
    return replace(train, epoch_samples=found)


def uncounted(data: DataConfig, train: TrainConfig) -> list[str]:
    """Why --train-epochs is no number of samples, in a line; none where it is."""
    if train.train_epochs is None or train.epoch_samples is not None:
        return []
    return [
        f"--train-epochs {train.train_epochs}: {_elsewhere(data)}; --epoch-samples says how long an epoch is"
    ]


def _elsewhere(data: DataConfig) -> str:
    """What of the data is not on this machine, in words; "" where all is."""
    if not data_sources(data):
        return "no data are named"
    missing = next((p for p in named_prefixes(data) if not MaskedDataset.exists(p)), None)
    return "" if missing is None else f"{missing} is not on this machine"


def what_counts(
    data: DataConfig, *, seq_length: int, seed: int, **samples: int | None
) -> list[str]:
    """How many tokens of a run's samples count, in lines; nothing is written.  samples: of each split."""
    if missing := _elsewhere(data):
        return [f"NOTE: {missing}: how many tokens count is not known here"]
    taught(data)
    few = {k: n if n is None or k == "repeats" else min(n, _COUNTED) for k, n in samples.items()}
    found = build_tuning(
        data, seq_length=seq_length, seed=seed, vocab_size=None, eod=None, cache_folder=None,
        tokenizer=None, **few,
    )  # fmt: skip
    said = [
        f"NOTE: the table has the first {few[split]:,} of {count:,} {split.replace('_', ' ')}"
        for split, count in samples.items()
        if count is not None and few[split] != count
    ]
    return [*overview(found), *found.notices, *said]
