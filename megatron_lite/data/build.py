"""A DataConfig becomes the training, validation and test datasets, as Megatron would build them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from megatron_lite.config.blend import SPLITS, Blend, blends
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.blended import BlendedDataset, BlendPlan, normalized, samples_per_dataset
from megatron_lite.data.cache import build_or_load
from megatron_lite.data.digest import digest_of
from megatron_lite.data.forms import STREAM, SampleForm, SamplesPlan
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.indices import blend_index
from megatron_lite.data.maps import FileMaps
from megatron_lite.data.masks import told_of_masks
from megatron_lite.data.mock import MockTokens
from megatron_lite.data.pretrain import (
    DocumentRange,
    TokenSource,
    split_ranges,
)
from megatron_lite.data.provenance import (
    MadeWith,
    look_at_ids,
    maker_of,
    require_same,
    told_of_unknown,
)
from megatron_lite.data.samples import Samples
from megatron_lite.storage.disk import Disk

_Array = npt.NDArray[Any]
SplitSizes: TypeAlias = "tuple[int | None, int | None, int | None]"
OPENERS = 8  # threads that open and check files
BLEND_ARRAYS = ("dataset", "sample", "counts")


@dataclass(frozen=True, slots=True)
class Datasets:
    """One dataset per split; None where nothing is asked for or --split gives it no share.

    digest: 64 bits of all index arrays and of the files' content: ranks that read the same have
    the same, wherever their copies lie.  notices: what to say of the files' tokenizers and
    of splits without a sample.
    """

    train: Samples | None
    valid: Samples | None
    test: Samples | None
    digest: int = 0
    asked: SplitSizes = (None, None, None)
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What all datasets of a run share."""

    seq_length: int
    seed: int
    surplus: float
    exact_counts: bool
    mmap_bin: bool
    verify: bool
    form: SampleForm = STREAM
    vocab_size: int | None = None
    cache_folder: str | None = None
    disk: Disk = field(default_factory=Disk)
    maps: FileMaps = field(default_factory=FileMaps)
    repeats: bool = False
    notices: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, data: DataConfig, **others: Any) -> Recipe:
        """What the flags say, beside the others."""
        return cls(
            surplus=data.mid_level_dataset_surplus, exact_counts=data.exact_blend_counts,
            mmap_bin=data.mmap_bin_files, verify=data.verify_data, **others,
        )  # fmt: skip

    def plan(
        self,
        source: TokenSource,
        name: str,
        split: str,
        documents: DocumentRange,
        samples: int | None,
    ) -> SamplesPlan:
        """One file's samples of one split."""
        return self.form.draw_up(
            source,
            name=name,
            split=split,
            documents=documents,
            num_samples=samples,
            seq_length=self.seq_length,
            seed=self.seed,
            vocab_size=self.vocab_size,
        )


class Made(NamedTuple):
    """The dataset of a split and the digest of all it reads."""

    dataset: Samples
    digest: int


def _make(plans: Sequence[SamplesPlan], blend: BlendPlan | None, recipe: Recipe) -> Made:
    """Build the arrays of a split, or take them from the cache, all of its datasets together."""

    def build() -> Iterator[tuple[str, _Array]]:
        for number, plan in enumerate(plans):
            for part, values in plan.build().items():
                yield f"{number}/{part}", values
        if blend is not None:
            for part, values in blend.build().items():
                yield f"blend/{part}", values

    asked = {
        "names": [plan.name for plan in plans],
        "split": plans[0].split,
        "seq_length": recipe.seq_length,
        "seed": recipe.seed,
        "blend": None if blend is None else blend.key(),
    }
    data = {"files": [plan.key() for plan in plans]}
    try:
        kept = build_or_load(
            recipe.cache_folder, asked, build, recipe.disk, data=data, verify=recipe.verify
        )
    except MemoryError as error:
        raise ConfigError(_too_long(plans, recipe, error)) from None
    datasets = [
        plan.dataset({part: kept.arrays[f"{number}/{part}"] for part in plan.parts})
        for number, plan in enumerate(plans)
    ]
    content = "".join(plan.source.content() for plan in plans)
    digest = digest_of(np.frombuffer(content.encode(), np.uint8), kept.digest)
    if blend is None:
        return Made(datasets[0], digest)
    arrays = {part: kept.arrays[f"blend/{part}"] for part in BLEND_ARRAYS}
    name = f"{plans[0].split} blend"
    return Made(BlendedDataset(datasets, blend, arrays, name=name), digest)


def _too_long(plans: Sequence[SamplesPlan], recipe: Recipe, error: MemoryError) -> str:
    """Why the order of so many samples has no place, and what is unusual about their number."""
    samples = sum(len(plan) for plan in plans)
    tokens = sum(int(plan.source.sequence_lengths.sum(dtype=np.int64)) for plan in plans)
    times = samples * recipe.seq_length / max(tokens, 1)
    return (
        f"split {plans[0].split}: the order of {samples:,} samples does not fit into this host's memory "
        f"({error}); its files have {tokens:,} tokens, which these are {times:,.0f} times - lower "
        "--train-iters or --train-samples, or --eval-iters"
    )


def _together(made: Sequence[Made | None], asked: SplitSizes) -> Datasets:
    digest = 0
    for one in made:
        digest = digest_of(np.array([0 if one is None else one.digest], np.uint64), digest)
    train, valid, test = (None if one is None else one.dataset for one in made)
    return Datasets(train, valid, test, digest, asked)


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
    tokenizer: MadeWith | None = None,
    form: SampleForm = STREAM,
    repeats: bool = False,
) -> Datasets:
    """Build or load what the run reads; a split of which 0 samples are asked for is None.

    A number of samples None means one epoch (only without weights).  tokenizer: the run's, with which
    all files must have been made; None compares them with each other only.  repeats: to train on, several
    files without weights are read as often as their number of samples takes, each in its share.  One
    rank per node calls it first and the others after a barrier: they then find the arrays in cache_folder.
    """
    recipe = Recipe.of(
        data, seq_length=seq_length, seed=seed, form=form, vocab_size=vocab_size,
        cache_folder=None if cache_folder is None else os.fspath(cache_folder),
        disk=Disk() if disk is None else disk, repeats=repeats,
    )  # fmt: skip
    asked = (train_samples, valid_samples, test_samples)
    found = blends(data)
    if found.mock:
        return _mock(recipe, asked, found.split, eod)
    named = (
        [found.shared]
        if found.shared is not None
        else [
            found.by_split[split]
            for split, samples in zip(SPLITS, asked, strict=True)
            if samples != 0 and split in found.by_split
        ]
    )
    opened = _open([prefix for blend in named for prefix in blend.prefixes], recipe)
    notices = _compare_tokenizers(
        opened, tokenizer, vocab_size, allowed=data.allow_tokenizer_mismatch
    )
    if form is STREAM:
        notices += told_of_masks(opened)
    if found.by_split:
        made = _per_split(found.by_split, opened, asked, recipe)
    else:
        assert found.shared is not None and found.split is not None
        made = [_blend(found.shared, opened, found.split, k, asked[k], recipe) for k in range(3)]
    return replace(_together(made, asked), notices=(*notices, *recipe.notices))


Opened: TypeAlias = "Mapping[str, IndexedDataset]"
"""By prefix."""


def _per_split(
    by_split: Mapping[str, Blend], opened: Opened, asked: SplitSizes, recipe: Recipe
) -> list[Made | None]:
    """Each split has its own files, read whole."""
    made: list[Made | None] = []
    for k, split in enumerate(SPLITS):
        blend = by_split.get(split)
        if blend is None or asked[k] == 0:
            made.append(None)
            continue
        if len(blend.prefixes) == 1:  # as Megatron: one file is no blend, whatever its weight
            blend = Blend(blend.prefixes, None)
        whole = [float(j == k) for j in range(3)]
        made.append(_blend(blend, opened, whole, k, asked[k], recipe))
    return made


def _open(prefixes: Sequence[str], recipe: Recipe) -> Opened:
    def open_one(prefix: str) -> IndexedDataset:
        return recipe.form.open(prefix, mmap_bin=recipe.mmap_bin, maps=recipe.maps)

    # each waits for the disk several times; the first error in the order of the list is raised
    once = list(dict.fromkeys(prefixes))
    with ThreadPoolExecutor(min(OPENERS, len(once) or 1), "open") as threads:
        return dict(zip(once, threads.map(open_one, once), strict=True))


def _compare_tokenizers(
    opened: Opened, tokenizer: MadeWith | None, vocab_size: int | None, *, allowed: bool
) -> list[str]:
    """Every file's maker beside the run's tokenizer; without one the ids beside the vocabulary."""

    def look(dataset: IndexedDataset) -> MadeWith | None:
        found = maker_of(dataset)
        if found is None and vocab_size is not None:
            look_at_ids(dataset, vocab_size)
        return found

    with ThreadPoolExecutor(min(OPENERS, len(opened) or 1), "look") as threads:
        makers = dict(zip(opened, threads.map(look, opened.values()), strict=True))
    said = require_same(makers, tokenizer, allowed=allowed, whose="this run's tokenizer")
    if said and vocab_size is not None:  # allowed; an id that has no row is not
        for dataset in opened.values():
            look_at_ids(dataset, vocab_size)
    return [*said, *told_of_unknown(makers)]


def _blend(
    blend: Blend,
    files: Opened,
    shares: Sequence[float],
    number: int,
    samples: int | None,
    recipe: Recipe,
) -> Made | None:
    """The dataset of split `number` (0 train, 1 valid, 2 test), or None."""
    first = files[blend.prefixes[0]]
    if samples == 0 or split_ranges(shares, len(first))[number] is None:
        return None
    name = SPLITS[number]
    if number:
        blend = _with_samples(blend, files, shares, number, samples, recipe)
        if not blend.prefixes:
            return None
    opened = [files[prefix] for prefix in blend.prefixes]
    ranges = [split_ranges(shares, len(source))[number] for source in opened]
    weights = None if blend.weights is None else normalized(blend.weights)
    if weights is None and recipe.repeats and not number and len(opened) > 1:
        weights = normalized([float(len(plan)) for plan in _epoch(opened, ranges, name, recipe)])
    if weights is not None and samples is None:
        raise ConfigError(f"a blend with weights needs a number of {name} samples")
    if len(opened) == 1 and weights is None:
        plan = recipe.plan(opened[0], opened[0].prefix, name, _present(ranges[0]), samples)
        return _make([plan], None, recipe)
    counts = _counts(weights, samples, recipe)
    plans = [
        recipe.plan(source, source.prefix, name, _present(documents), count)
        for source, documents, count in zip(
            opened, ranges, counts or [None] * len(opened), strict=True
        )
    ]
    lengths = [len(plan) for plan in plans]
    if weights is not None:
        assert samples is not None
        size: int | None = sum(samples_per_dataset(weights, samples))
    else:
        weights = [float(length) for length in lengths]
        size = None if samples is None else min(samples, sum(lengths))
    return _make(plans, BlendPlan.draw_up(weights, size, lengths), recipe)


def _epoch(
    opened: Sequence[IndexedDataset],
    ranges: Sequence[DocumentRange | None],
    name: str,
    recipe: Recipe,
) -> list[SamplesPlan]:
    """Each file's samples, once."""
    return [
        recipe.plan(source, source.prefix, name, _present(documents), None)
        for source, documents in zip(opened, ranges, strict=True)
    ]


def samples_of_an_epoch(
    data: DataConfig, *, seq_length: int, seed: int, form: SampleForm = STREAM
) -> int:
    """How many samples the training split has, each of its files read once; nothing is written."""
    recipe = Recipe.of(data, seq_length=seq_length, seed=seed, form=form)
    found = blends(data)
    blend, shares = found.by_split.get("train"), (1.0, 0.0, 0.0)
    if blend is None:
        assert found.shared is not None and found.split is not None, "rules.length knows others"
        blend, shares = found.shared, found.split
    files = _open(blend.prefixes, recipe)
    opened = [files[prefix] for prefix in blend.prefixes]
    ranges = [split_ranges(shares, len(source))[0] for source in opened]
    return sum(len(plan) for plan in _epoch(opened, ranges, SPLITS[0], recipe))


def _with_samples(
    blend: Blend,
    files: Opened,
    shares: Sequence[float],
    number: int,
    samples: int | None,
    recipe: Recipe,
) -> Blend:
    """The files that have a sample of an evaluation split; nothing is trained on it: a line each."""
    kept, said, name = [], [], SPLITS[number]
    once = blend.weights is None and len(blend.prefixes) > 1  # each file once, whatever is asked
    for k, prefix in enumerate(blend.prefixes):
        source = files[prefix]
        documents = _present(split_ranges(shares, len(source))[number])
        why = recipe.form.shortage(source, documents, recipe.seq_length, None if once else samples)
        if why:
            said.append(f" > {source.prefix}: split {name} {why}")
        else:
            kept.append(k)
    rest = f"there is no {name} evaluation"
    if kept:
        rest = f"the {name} evaluation reads the other {len(kept)} of {len(blend.prefixes)} files"
    recipe.notices.extend(f"{line}: {rest}" for line in said)
    if not said:
        return blend
    weights = None if blend.weights is None else tuple(blend.weights[k] for k in kept)
    return Blend(tuple(blend.prefixes[k] for k in kept), weights)


def _present(documents: DocumentRange | None) -> DocumentRange:
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
    recipe: Recipe, asked: SplitSizes, shares: Sequence[float] | None, eod: int | None
) -> Datasets:
    if recipe.vocab_size is None or eod is None:
        raise ConfigError("--mock-data needs a tokenizer or --vocab-size")
    source = MockTokens(recipe.vocab_size, eod)
    assert shares is not None
    ranges = split_ranges(shares, len(source.sequence_lengths))
    return _together(
        [
            None
            if samples == 0 or documents is None
            else _make([recipe.plan(source, "mock data", split, documents, samples)], None, recipe)
            for split, documents, samples in zip(SPLITS, ranges, asked, strict=True)
        ],
        asked,
    )
