"""Several datasets by weight: at every step the one furthest behind its share gives a sample."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError
from megatron_lite.data.cache import Arrays, build_or_load
from megatron_lite.data.indices import blend_index, exhaustive_blend_index
from megatron_lite.data.pretrain import Samples
from megatron_lite.storage.disk import Disk


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1, by the double arithmetic Megatron uses."""
    values = np.array(weights, dtype=np.float64)
    return [float(value) for value in values / np.sum(values)]


def samples_per_dataset(
    weights: Sequence[float], num_samples: int, surplus: float = 0.0
) -> list[int]:
    """ceil(ceil(N w) (1 + surplus)) of every dataset; weights sum to 1."""
    return [int(math.ceil(math.ceil(num_samples * weight) * (1 + surplus))) for weight in weights]


class BlendedDataset:
    """A dataset of `size` samples drawn from several in proportion to their weights.

    weights: as many as datasets, any positive numbers; size None takes every sample of every
    dataset once.  Step k is Megatron's: the order does not depend on size.
    """

    def __init__(
        self,
        datasets: Sequence[Samples],
        weights: Sequence[float],
        size: int | None,
        *,
        name: str,
        cache_folder: str | os.PathLike[str] | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.datasets = list(datasets)
        self.name = name
        self.weights = normalized(weights)
        lengths = [len(dataset) for dataset in datasets]
        key: dict[str, Any] = {"kind": "blend", "weights": self.weights, "size": size}
        if size is None:
            key["lengths"] = lengths

        def build() -> Arrays:
            if size is None:
                index = exhaustive_blend_index(lengths)
            else:
                index = blend_index(self.weights, size)
            return {"dataset": index.dataset, "sample": index.sample}

        arrays = build_or_load(cache_folder, key, build, Disk() if disk is None else disk)
        self.dataset_index: npt.NDArray[np.int16] = arrays["dataset"]
        self.dataset_sample_index: npt.NDArray[np.int64] = arrays["sample"]
        self.counts = np.bincount(self.dataset_index, minlength=len(datasets)).tolist()
        for dataset, taken in zip(datasets, self.counts, strict=True):
            if taken > len(dataset):
                raise DataError(
                    f"{name}: the blend takes {taken} samples of {dataset.name}, which has "
                    f"{len(dataset)} - raise --mid-level-dataset-surplus or use "
                    "--exact-blend-counts"
                )

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, sample: int) -> npt.NDArray[np.int64]:
        if not 0 <= sample < len(self):
            raise IndexError(f"{self.name}: no sample {sample}, it has {len(self)}")
        dataset = self.datasets[int(self.dataset_index[sample])]
        return dataset[int(self.dataset_sample_index[sample])]
