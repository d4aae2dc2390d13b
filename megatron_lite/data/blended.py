"""Several datasets by weight: at every step the one furthest behind its share gives a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError
from megatron_lite.data.cache import Arrays
from megatron_lite.data.indices import blend_index, exhaustive_blend_index
from megatron_lite.data.samples import Sample, Samples


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1, by the double arithmetic Megatron uses."""
    values = np.array(weights, dtype=np.float64)
    return [float(value) for value in values / np.sum(values)]


def samples_per_dataset(
    weights: Sequence[float], num_samples: int, surplus: float = 0.0
) -> list[int]:
    """ceil(ceil(N w) (1 + surplus)) of every dataset; weights sum to 1."""
    return [int(math.ceil(math.ceil(num_samples * weight) * (1 + surplus))) for weight in weights]


@dataclass(frozen=True, slots=True)
class BlendPlan:
    """How many samples of which datasets; size None takes every sample of every dataset once."""

    weights: tuple[float, ...]
    size: int | None
    lengths: tuple[int, ...]

    @staticmethod
    def draw_up(weights: Sequence[float], size: int | None, lengths: Sequence[int]) -> BlendPlan:
        """weights: any positive numbers, as many as datasets."""
        return BlendPlan(tuple(normalized(weights)), size, tuple(lengths))

    def key(self) -> dict[str, Any]:
        """All that the arrays depend on."""
        lengths = list(self.lengths) if self.size is None else None
        return {"weights": list(self.weights), "size": self.size, "lengths": lengths}

    def build(self) -> Arrays:
        """Which dataset and which of its samples at every step, and the samples of each."""
        if self.size is None:
            index = exhaustive_blend_index(self.lengths)
        else:
            index = blend_index(self.weights, self.size)
        counts = np.bincount(index.dataset, minlength=len(self.weights)).astype(np.int64)
        return {"dataset": index.dataset, "sample": index.sample, "counts": counts}


class BlendedDataset:
    """A dataset of `size` samples drawn from several in proportion to their weights.

    Step k is Megatron's: the order does not depend on size.
    arrays: what plan.build() gives, from a cache perhaps.
    """

    def __init__(
        self, datasets: Sequence[Samples], plan: BlendPlan, arrays: Arrays, *, name: str
    ) -> None:
        self.datasets = list(datasets)
        self.name = name
        self.weights = plan.weights
        self.dataset_index: npt.NDArray[np.int16] = arrays["dataset"]
        self.dataset_sample_index: npt.NDArray[np.int64] = arrays["sample"]
        self.counts: list[int] = arrays["counts"].tolist()
        for dataset, taken in zip(datasets, self.counts, strict=True):
            if taken > len(dataset):
                raise DataError(
                    f"{name}: the blend takes {taken} samples of {dataset.name}, which has "
                    f"{len(dataset)} - raise --mid-level-dataset-surplus or use "
                    "--exact-blend-counts"
                )

    def __len__(self) -> int:
        return len(self.dataset_index)

    def content(self) -> str:
        """What all of them hold."""
        return "".join(dataset.content() for dataset in self.datasets)

    def __getitem__(self, sample: int) -> Sample:
        if not 0 <= sample < len(self):
            raise IndexError(f"{self.name}: no sample {sample}, it has {len(self)}")
        dataset = self.datasets[int(self.dataset_index[sample])]
        return dataset[int(self.dataset_sample_index[sample])]
