"""A DataConfig becomes the training, validation and test datasets, as Megatron would build them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_lite.config.blend import SPLITS, Blend, blends
from megatron_lite.config.data import DataConfig
from megatron_lite.config.errors import ConfigError
from megatron_lite.data.blended import BlendedDataset, normalized, samples_per_dataset
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.indices import blend_index
from megatron_lite.data.mock import MockTokens
from megatron_lite.data.pretrain import (
    GPTDataset,
    Range,
    Samples,
    TokenSource,
    split_ranges,
)
from megatron_lite.storage.disk import Disk

MOCK_SPLIT = (1 / 3, 1 / 3, 1 / 3)  # what Megatron takes


@dataclass(frozen=True, slots=True)
class Datasets:
    """One dataset per split; None where nothing is asked for or --split gives it no share."""

    train: Samples | None
    valid: Samples | None
    test: Samples | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What all datasets of a run share."""

    seq_length: int
    seed: int
    vocab_size: int | None
    surplus: float
    exact_counts: bool
    mmap_bin: bool
    cache_folder: str | None
    disk: Disk

    def dataset(
        self, source: TokenSource, name: str, split: str, documents: Range, samples: int | None
    ) -> GPTDataset:
        """One file's samples of one split."""
        return GPTDataset(
            source,
            name=name,
            split=split,
            documents=documents,
            num_samples=samples,
            seq_length=self.seq_length,
            seed=self.seed,
            vocab_size=self.vocab_size,
            cache_folder=self.cache_folder,
            disk=self.disk,
        )


def build_datasets(
    data: DataConfig,
    *,
    seq_length: int,
    seed: int,
    train_samples: int | None,
    valid_samples: int | None,
    test_samples: int | None,
    vocab_size: int | None,
    eod: int | None,
    cache_folder: str | os.PathLike[str] | None,
    disk: Disk | None = None,
) -> Datasets:
    """Build or load what the run reads; a split of which 0 samples are asked for is None.

    A number of samples None means one epoch (only without weights).  One rank per node calls it
    first and the others after a barrier: they then find the arrays in cache_folder.
    """
    recipe = Recipe(
        seq_length=seq_length,
        seed=seed,
        vocab_size=vocab_size,
        surplus=data.mid_level_dataset_surplus,
        exact_counts=data.exact_blend_counts,
        mmap_bin=data.mmap_bin_files,
        cache_folder=None if cache_folder is None else os.fspath(cache_folder),
        disk=Disk() if disk is None else disk,
    )
    asked = [train_samples, valid_samples, test_samples]
    found = blends(data)
    if found.mock:
        return _mock(recipe, asked, MOCK_SPLIT if data.split is None else found.split, eod)
    if found.by_split:
        return _per_split(found.by_split, asked, recipe)
    assert found.shared is not None and found.split is not None
    opened = _open(found.shared, recipe)
    return Datasets(
        *[_blend(found.shared, opened, found.split, k, asked[k], recipe) for k in range(3)]
    )


def _per_split(
    by_split: Mapping[str, Blend], asked: Sequence[int | None], recipe: Recipe
) -> Datasets:
    """Each split has its own files, read whole."""
    datasets: list[Samples | None] = []
    for k, split in enumerate(SPLITS):
        blend = by_split.get(split)
        if blend is None or asked[k] == 0:
            datasets.append(None)
            continue
        if len(blend.prefixes) == 1:  # as Megatron: one file is no blend, whatever its weight
            blend = Blend(blend.prefixes, None)
        whole = [float(j == k) for j in range(3)]
        datasets.append(_blend(blend, _open(blend, recipe), whole, k, asked[k], recipe))
    return Datasets(*datasets)


def _open(blend: Blend, recipe: Recipe) -> list[IndexedDataset]:
    return [IndexedDataset(prefix, mmap_bin=recipe.mmap_bin) for prefix in blend.prefixes]


def _blend(
    blend: Blend,
    opened: Sequence[IndexedDataset],
    shares: Sequence[float],
    number: int,
    samples: int | None,
    recipe: Recipe,
) -> Samples | None:
    """The dataset of split `number` (0 train, 1 valid, 2 test), or None."""
    ranges = [split_ranges(shares, len(source))[number] for source in opened]
    if samples == 0 or ranges[0] is None:
        return None
    name = SPLITS[number]
    weights = None if blend.weights is None else normalized(blend.weights)
    if weights is not None and samples is None:
        raise ConfigError(f"a blend with weights needs a number of {name} samples")
    if len(opened) == 1 and weights is None:
        only = opened[0]
        return recipe.dataset(only, only.prefix, name, _present(ranges[0]), samples)
    counts = _counts(weights, samples, recipe)
    datasets = [
        recipe.dataset(source, source.prefix, name, _present(documents), count)
        for source, documents, count in zip(
            opened, ranges, counts or [None] * len(opened), strict=True
        )
    ]
    if weights is not None:
        assert samples is not None
        size: int | None = sum(samples_per_dataset(weights, samples))
    else:
        weights = [float(len(dataset)) for dataset in datasets]
        size = None if samples is None else min(samples, sum(len(d) for d in datasets))
    return BlendedDataset(
        datasets,
        weights,
        size,
        name=f"{name} blend",
        cache_folder=recipe.cache_folder,
        disk=recipe.disk,
    )


def _present(documents: Range | None) -> Range:
    assert documents is not None, "a split has a share in all files or in none"
    return documents


def _counts(
    weights: Sequence[float] | None, samples: int | None, recipe: Recipe
) -> Sequence[int | None] | None:
    """Samples to build of every dataset; None builds one epoch of each."""
    if weights is None or samples is None:
        return None
    if not recipe.exact_counts:
        return samples_per_dataset(weights, samples, recipe.surplus)
    index = blend_index(weights, sum(samples_per_dataset(weights, samples)))
    # at least one: a dataset the blend does not reach must still be a dataset
    return [max(1, int((index.dataset == number).sum())) for number in range(len(weights))]


def _mock(
    recipe: Recipe, asked: Sequence[int | None], shares: Sequence[float] | None, eod: int | None
) -> Datasets:
    if recipe.vocab_size is None or eod is None:
        raise ConfigError("--mock-data needs a tokenizer or --vocab-size")
    source = MockTokens(recipe.vocab_size, eod)
    assert shares is not None
    ranges = split_ranges(shares, len(source.sequence_lengths))
    return Datasets(
        *[
            None
            if samples == 0 or documents is None
            else recipe.dataset(source, "mock data", split, documents, samples)
            for split, documents, samples in zip(SPLITS, ranges, asked, strict=True)
        ]
    )
