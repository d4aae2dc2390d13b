"""What a run reads equals what megatron-core would read, sample for sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.blended import BlendedDataset, BlendPlan
from megatron_lite.data.build import Datasets, build_datasets
from megatron_lite.data.pretrain import DocumentRange, GPTDataset, split_ranges
from tests.data.conftest import WriteDocuments
from tests.support.corpora import write_pair
from tests.support.extras import needs

SEQ_LENGTH = 16


def build(
    data: DataConfig, sizes: tuple[int | None, int | None, int | None], **other: Any
) -> Datasets:
    settings: dict[str, Any] = dict(
        seq_length=SEQ_LENGTH, seed=1234, vocab_size=100, eod=99, cache_folder=None
    )
    train, valid, test = sizes
    settings.update(train_samples=train, valid_samples=valid, test_samples=test, **other)
    return build_datasets(data, **settings)


def samples(dataset: Any) -> list[list[int]]:
    return [dataset[i].tokens.tolist() for i in range(len(dataset))]


def oracle(sizes: tuple[int | None, int | None, int | None], **config: Any) -> list[Any]:
    needs("megatron.core.datasets")
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset as Theirs
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    class Tokenizer:
        eod, pad, vocab_size = 99, 101, 100
        unique_identifiers = {"class": "test"}

    settings = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQ_LENGTH,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=Tokenizer(),
        **config,
    )
    builder = BlendedMegatronDatasetBuilder(Theirs, list(sizes), lambda: True, settings)
    return builder.build()


def assert_equal(ours: Datasets, theirs: list[Any]) -> None:
    for mine, other in zip((ours.train, ours.valid, ours.test), theirs, strict=True):
        if mine is None or other is None:
            assert mine is None and other is None
            continue
        assert len(mine) == len(other)
        for i in range(len(mine)):
            expected = other[i]
            assert mine[i].tokens[:-1].tolist() == expected["tokens"].tolist()
            assert mine[i].tokens[1:].tolist() == expected["labels"].tolist()


@pytest.mark.parametrize("split", ["949,50,1", "8,1,1", "100,0,0", "60 40"])
@pytest.mark.parametrize("sizes", [(50, 10, 4), (400, 33, 9)])
def test_one_file_equals_megatron_core(
    write_documents: WriteDocuments, split: str, sizes: tuple[int, int, int]
) -> None:
    prefix = str(write_documents("a", 600, longest=20))
    theirs = oracle(sizes, blend=([prefix], None), split=split)
    assert_equal(build(DataConfig(data_path=[prefix], split=split), sizes), theirs)


@pytest.mark.parametrize("weights", [(0.35, 0.65), (3.0, 1.0), (0.999, 0.001)])
def test_a_weighted_blend_equals_megatron_core(
    write_documents: WriteDocuments, weights: tuple[float, float]
) -> None:
    prefixes = [str(write_documents("a", 200, 1)), str(write_documents("b", 90, 2))]
    sizes = (700, 40, 20)
    theirs = oracle(sizes, blend=(prefixes, list(weights)), split="8,1,1")
    path = [str(weights[0]), prefixes[0], str(weights[1]), prefixes[1]]
    assert_equal(build(DataConfig(data_path=path, split="8,1,1"), sizes), theirs)


@pytest.mark.parametrize("sizes", [(50, 5, 5), (None, None, None)])
def test_a_blend_without_weights_equals_megatron_core(
    write_documents: WriteDocuments, sizes: tuple[int | None, int | None, int | None]
) -> None:
    prefixes = [str(write_documents("a", 120, 1)), str(write_documents("b", 60, 2))]
    theirs = oracle(sizes, blend=(prefixes, None), split="8,1,1")
    assert_equal(build(DataConfig(data_path=prefixes, split="8,1,1"), sizes), theirs)


def test_files_per_split_equal_megatron_core(write_documents: WriteDocuments) -> None:
    a, b, c = (str(write_documents(name, 80, seed)) for seed, name in enumerate("abc"))
    sizes = (150, 30, 0)
    blends = [([a, b], [0.3, 0.7]), ([c], None), None]
    theirs = oracle(sizes, blend_per_split=blends)
    data = DataConfig(train_data_path=["0.3", a, "0.7", b], valid_data_path=[c])
    assert_equal(build(data, sizes), theirs)


def test_every_way_to_name_a_blend_gives_the_same(
    write_documents: WriteDocuments, tmp_path: Path
) -> None:
    a, b = str(write_documents("a", 80, 1)), str(write_documents("b", 80, 2))
    items = ["0.3", a, "0.7", b]
    (tmp_path / "args").write_text(" ".join(items))
    (tmp_path / "args.json").write_text(json.dumps({"train": items}))
    sizes = (40, 0, 0)
    whole = build(DataConfig(data_path=items, split="1"), sizes)
    for data in (
        DataConfig(data_args_path=str(tmp_path / "args"), split="1"),
        DataConfig(train_data_path=items),
        DataConfig(per_split_data_args_path=str(tmp_path / "args.json")),
    ):
        assert samples(build(data, sizes).train) == samples(whole.train)


def test_mock_data_equals_megatron_cores() -> None:
    needs("megatron.core.datasets")
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    from megatron_lite.data.mock import MockTokens

    class Tokenizer:
        eod, vocab_size = 99, 100

    theirs, ours = MockGPTLowLevelDataset(Tokenizer()), MockTokens(100, 99)
    assert np.array_equal(ours.sequence_lengths, theirs.sequence_lengths)
    for index in (0, 1, 77, 99_999):
        size = int(ours.sequence_lengths[index])
        assert ours.get(index).tolist() == theirs.get(index).tolist()
        middle = size // 2
        assert ours.get(index, middle).tolist() == theirs.get(index, middle).tolist()
        assert ours.get(index, 1, middle - 1).tolist() == theirs.get(index, 1, middle - 1).tolist()


def test_mock_data_are_dealt_evenly_whatever_the_split_says() -> None:
    plain = build(DataConfig(mock_data=True), (10, 5, 3))
    for split in ("99,1,0", "1,0,0"):
        other = build(DataConfig(mock_data=True, split=split), (10, 5, 3))
        for name in ("train", "valid", "test"):
            one, same = getattr(plain, name), getattr(other, name)
            first = [[of[i].tokens.tolist() for i in range(3)] for of in (one, same)]
            assert first[0] == first[1]  # of millions of samples


def test_mock_data_needs_no_files() -> None:
    built = build(DataConfig(mock_data=True), (10, 5, 0))
    assert built.test is None and built.train is not None and built.valid is not None
    assert built.train[3].tokens.shape == (SEQ_LENGTH + 1,)
    with pytest.raises(ConfigError, match="--mock-data"):
        build(DataConfig(mock_data=True), (10, 5, 0), vocab_size=None)


@pytest.mark.parametrize(
    "number, bounds",
    [
        (79000, [0, 74971, 78921, 79000]),
        (1000, [0, 949, 999, 1000]),
        (997, [0, 946, 996, 997]),
        (10, [0, 9, 10, 10]),
    ],
)
def test_split_bounds_are_megatrons(number: int, bounds: list[int]) -> None:
    expected = [DocumentRange(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert split_ranges((0.949, 0.05, 0.001), number) == expected


def test_a_split_without_documents_is_an_error_only_where_it_is_trained_on(
    write_documents: WriteDocuments,
) -> None:
    prefix = str(write_documents("a", 10))
    made = build(DataConfig(data_path=[prefix], split="949,50,1"), (4, 1, 1))
    assert made.test is None and "split test of 10 documents has 0 documents" in made.notices[-1]
    assert build(DataConfig(data_path=[prefix], split="949,50,1"), (4, 1, 0)).test is None
    with pytest.raises(DataError, match="split train of 10 documents has 0 documents.*--split"):
        build(DataConfig(data_path=[prefix], split="1,50,949"), (4, 1, 1))


def test_data_shorter_than_a_sample_repeats_or_is_refused(write_documents: WriteDocuments) -> None:
    prefix = str(write_documents("a", 3, longest=3))
    data = DataConfig(data_path=[prefix], split="1")
    train = build(data, (4, 0, 0)).train
    assert isinstance(train, GPTDataset) and train.epochs > 1 and len(train) >= 4
    assert train[3].tokens.shape == (SEQ_LENGTH + 1,)
    with pytest.raises(DataError, match="one sample needs 17"):
        build(data, (None, 0, 0))


def test_more_samples_than_memory_has_indices_for_name_their_flags(
    write_documents: WriteDocuments,
) -> None:
    """2^48 samples: no host has an array of a quadrillion documents, whatever it lets a process ask for."""
    data = DataConfig(data_path=[str(write_documents("a", 3))], split="1,0,0")
    with pytest.raises(ConfigError, match="does not fit into this host's memory") as refused:
        build(data, (2**48, None, None))
    for said in (
        "split train: the order of 281,474,976,710,6",
        " times - lower --train-iters or --train-samples",
    ):
        assert said in str(refused.value)


def test_token_ids_beyond_the_vocabulary_name_dataset_and_sample(
    write_documents: WriteDocuments, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(data_path=[str(write_documents("a", 30))], split="1")
    with pytest.raises(DataError, match=r"/a.bin: token \d+ is token id 99, the vocabulary has 99"):
        build(data, (5, 0, 0), vocab_size=99)
    # the start looks at a few pieces of a long file; reading looks at every sample
    monkeypatch.setattr("megatron_lite.data.build.look_at_ids", lambda dataset, vocab_size: None)
    train = build(data, (5, 0, 0), vocab_size=99).train
    assert train is not None
    with pytest.raises(DataError, match=r"/a: sample \d+ of split train holds token id 99"):
        samples(train)


def test_exact_counts_build_what_the_blend_takes_in_the_same_order(
    write_documents: WriteDocuments,
) -> None:
    path = ["0.35", str(write_documents("a", 900, 1)), "0.65", str(write_documents("b", 900, 2))]
    exact = DataConfig(data_path=path, split="1", exact_blend_counts=True)
    surplus = DataConfig(data_path=path, split="1")
    mine, other = build(exact, (600, 0, 0)).train, build(surplus, (600, 0, 0)).train
    assert isinstance(mine, BlendedDataset) and isinstance(other, BlendedDataset)
    assert np.array_equal(mine.dataset_index, other.dataset_index)
    assert mine.counts == [210, 390]
    assert len(samples(mine)) == 600


def test_a_blend_that_takes_more_than_there_is_says_what_to_do() -> None:
    class Three:
        name = "three"

        def __len__(self) -> int:
            return 3

        def __getitem__(self, sample: int) -> Any: ...

    with pytest.raises(DataError, match="takes 5 samples of three, which has 3.*surplus"):
        plan = BlendPlan.draw_up([0.5, 0.5], 10, [3, 3])
        BlendedDataset([Three(), Three()], plan, plan.build(), name="blend")


@pytest.mark.parametrize("weights", [(), (0.3, 0.7)])
def test_an_evaluation_split_without_a_sample_is_a_line(
    weights: tuple[float, ...], tmp_path: Path
) -> None:
    prefixes = []
    for name in "ab"[: len(weights) or 1]:
        prefixes.append(write_pair(tmp_path / name, [[1] * 5] * 401))
    words = [word for pair in zip(map(str, weights), prefixes, strict=False) for word in pair]
    data = DataConfig(data_path=words or prefixes, split="949,50,1")
    made = build_datasets(data, seq_length=8, seed=1, train_samples=20, valid_samples=4,
                          test_samples=4, vocab_size=9, eod=None, cache_folder=None)  # fmt: skip
    assert made.train is not None and made.valid is not None and made.test is None
    said = [line for line in made.notices if "split test of 401 documents has 0 documents" in line]
    assert len(said) == len(prefixes)


@pytest.mark.parametrize("weights", [None, (0.3, 0.5, 0.2)])
def test_a_blend_evaluates_the_files_that_have_a_sample(
    weights: tuple[float, ...] | None, write_documents: WriteDocuments
) -> None:
    names = {"a": 10, "b": 2000, "c": 1500}  # of 10 documents --split leaves none for testing
    prefixes = {name: str(write_documents(name, count)) for name, count in names.items()}

    def blend(*chosen: str) -> list[str]:
        if weights is None:
            return [prefixes[name] for name in chosen]
        return [w for n in chosen for w in (str(weights["abc".index(n)]), prefixes[n])]

    data = DataConfig(data_path=blend("a", "b", "c"), split="949,50,1")
    made = build(data, (40, 4, 4))
    (said,) = [line for line in made.notices if "split test" in line]
    assert "a: split test of 10 documents has 0 documents: the test evaluation reads the" in said
    assert "other 2 of 3 files" in said
    others = build(DataConfig(data_path=blend("b", "c"), split="949,50,1"), (0, 0, 4))
    assert made.test is not None and others.test is not None
    assert np.array_equal(samples(made.test), samples(others.test))
    one = build(DataConfig(data_path=blend("a", "b"), split="949,50,1"), (40, 4, 4))
    assert one.test is not None and len(one.test) >= 4
    assert not [n for n in build(data, (40, 4, 0)).notices if "split test" in n], (
        "not read, not told"
    )


def test_an_evaluation_split_shorter_than_a_sample_is_read_again(
    write_documents: WriteDocuments,
) -> None:
    data = DataConfig(data_path=[str(write_documents("a", 12, longest=3))], split="80,10,10")
    made = build(data, (4, 3, 3))
    assert made.test is not None and len(made.test) >= 3
    assert not [line for line in made.notices if "split v" in line or "split test" in line]
