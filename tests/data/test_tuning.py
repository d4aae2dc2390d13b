"""Rows of samples with a mask: packed tightly, shuffled anew in each epoch, the same however they are read."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.blueprint.batches import batch_schedule
from megatron_lite.blueprint.length import sample_counts
from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.config.sections.train import TrainConfig
from megatron_lite.data import sources
from megatron_lite.data.batch import collate
from megatron_lite.data.blended import BlendedDataset
from megatron_lite.data.build import Datasets
from megatron_lite.data.masks import MaskedDataset, mask_prefix
from megatron_lite.data.overview import overview
from megatron_lite.data.packing import pack_rows
from megatron_lite.data.pretrain import DocumentRange
from megatron_lite.data.sources import kind_for, what_counts, with_epochs
from megatron_lite.data.taught import taught
from megatron_lite.data.tuning import TuningDataset, TuningPlan
from tests.support.talks import numbers, talk, tuned

SEQ = 100


def build(data: DataConfig, *prefixes: str, seq_length: int = SEQ, seed: int = 5,
          train_samples: int | None = None, **changes: Any) -> Datasets:  # fmt: skip
    named = dataclasses.replace(data, data_path=list(prefixes), split="8,2,0", **changes)
    return kind_for("sft").build(
        named, seq_length=seq_length, seed=seed, train_samples=train_samples, valid_samples=train_samples,
        test_samples=0, vocab_size=265, eod=261, cache_folder=None, tokenizer=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, str]:
    return tuned(tmp_path_factory.mktemp("talks"), numbers(40), template="chatml")


def fewest(lengths: list[int], room: int) -> int:
    """Rows that a search over all ways to divide them finds."""
    return min(
        len(set(ways))
        for ways in itertools.product(range(len(lengths)), repeat=len(lengths))
        if all(
            sum(n for n, way in zip(lengths, ways, strict=True) if way == row) <= room
            for row in ways
        )
    )


def test_best_fit_decreasing_by_hand_and_beside_a_search() -> None:
    rows = pack_rows(np.array([7, 6, 3, 2, 2]), 10)
    found = [rows.slots[a:b].tolist() for a, b in itertools.pairwise(rows.bounds)]
    assert found == [[0, 2], [1, 3, 4]]
    random = np.random.default_rng(1)
    for _ in range(6):
        lengths = sorted((int(n) for n in random.integers(1, 11, 6)), reverse=True)
        rows = pack_rows(np.array(lengths), 10)
        least = fewest(lengths, 10)
        assert least <= len(rows) <= least * 11 / 9 + 1
        assert sorted(rows.slots.tolist()) == list(range(6))
        for a, b in itertools.pairwise(rows.bounds):
            assert 0 < sum(lengths[n] for n in rows.slots[a:b]) <= 10


def test_a_row_is_its_samples_their_masks_and_borders(made: tuple[DataConfig, str]) -> None:
    data, prefix = made
    train = build(data, prefix).train
    assert isinstance(train, TuningDataset)
    source = MaskedDataset(prefix)
    seen: list[int] = []
    for row in range(len(train)):
        sample, parts = train[row], train.numbers(row)
        assert sample.loss_mask is not None and sample.segments is not None
        place, borders = 0, [0]
        for number in parts:
            tokens, mask = source[number], source.mask(number, len(source[number]))
            size = len(tokens)
            assert sample.tokens[place : place + size].tolist() == tokens.tolist()
            # a prediction counts where its label is learned, and never across a border
            assert sample.loss_mask[place : place + size - 1].tolist() == mask[1:].tolist()
            assert not sample.loss_mask[place + size - 1 : place + size].any()
            place += size
            borders.append(min(place, SEQ))
        assert set(sample.tokens[place:].tolist()) <= {261}  # filled up, and nothing counts there
        assert not sample.loss_mask[place - 1 :].any()
        assert sample.segments.tolist() == sorted({*borders, SEQ})
        seen += parts
    assert sorted(seen) == list(range(32))  # each sample of the split, once
    batch = collate([train[0]], np.array([0]))
    assert batch.positions is not None and batch.segments is not None
    assert batch.positions[0, batch.segments[:-1]].tolist() == [0] * (len(batch.segments) - 1)


def test_each_epoch_is_another_order_and_a_longer_run_begins_as_a_shorter_one(
    made: tuple[DataConfig, str],
) -> None:
    data, prefix = made
    one = build(data, prefix).train
    assert isinstance(one, TuningDataset)
    rows = len(one)
    three = build(data, prefix, train_samples=2 * rows + 1).train
    assert isinstance(three, TuningDataset) and len(three) == 3 * rows
    epochs = [[three.numbers(e * rows + r) for r in range(rows)] for e in range(3)]
    assert epochs[0] == [one.numbers(row) for row in range(rows)]
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(32))
    other = build(data, prefix, seed=6).train
    assert isinstance(other, TuningDataset) and [other.numbers(n) for n in range(rows)] != epochs[0]


def test_epochs_of_several_files_read_each_sample_so_often(
    made: tuple[DataConfig, str], tmp_path: Path
) -> None:
    """Whatever their sizes; what fills the last batch comes behind."""
    data, prefix = made
    few, fewer = (tuned(tmp_path / name, numbers(n), template="chatml")[1]
                  for name, n in (("a", 11), ("b", 5)))  # fmt: skip
    named = dataclasses.replace(data, data_path=[prefix, few, fewer], split="8,2,0")
    asked = TrainConfig(train_epochs=3, objective="sft", global_batch_size=4, seed=5, eval_iters=0)
    train = with_epochs(named, asked, seq_length=SEQ)
    alone = [build(data, p).train for p in (prefix, few, fewer)]
    assert train.epoch_samples == sum(len(part) for part in alone if part)
    assert train.samples_asked is not None and train.samples_asked % 4
    counts = sample_counts(train, batch_schedule(train, seq_length=SEQ, dp=1))
    found = kind_for("sft").build(
        named, seq_length=SEQ, seed=5, vocab_size=265, eod=261, cache_folder=None, tokenizer=None,
        **counts,
    ).train  # fmt: skip
    assert isinstance(found, BlendedDataset)
    assert len(found) >= counts["train_samples"] > train.samples_asked
    read = zip(found.dataset_index, found.dataset_sample_index, strict=True)
    times: Counter[tuple[int, int]] = Counter()
    for part, row in itertools.islice(read, train.samples_asked):
        rows = found.datasets[part]
        assert isinstance(rows, TuningDataset)
        times.update((int(part), number) for number in rows.numbers(int(row)))
    assert set(times.values()) == {3} and len(times) == 32 + 9 + 4


def test_an_epoch_of_documents_is_what_one_reading_gives(made: tuple[DataConfig, str]) -> None:
    data, prefix = made
    named = dataclasses.replace(data, data_path=[prefix], split="1,0,0")
    train = with_epochs(named, TrainConfig(train_epochs=2), seq_length=SEQ)
    tokens = int(MaskedDataset(prefix).sequence_lengths.sum())
    assert train.epoch_samples == (tokens - 1) // SEQ
    with pytest.raises(ConfigError, match="--epoch-samples 3, and an epoch of the data here is"):
        with_epochs(named, TrainConfig(train_epochs=2, epoch_samples=3), seq_length=SEQ)


def test_a_run_without_end_is_counted_in_its_beginning_or_refused(
    made: tuple[DataConfig, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run puts no more samples in order than it can in seconds."""
    data, prefix = made
    named = dataclasses.replace(data, data_path=[prefix], split="1,0,0")
    monkeypatch.setattr(sources, "_COUNTED", 64)
    splits = {"valid_samples": 0, "test_samples": 0}
    table, shares, epoch, note = what_counts(
        named, seq_length=SEQ, seed=5, train_samples=20_000, **splits
    )
    assert shares.split()[3] == "64" and "40 samples" in epoch
    assert note == "NOTE: the table has the first 64 of 20,000 train samples"
    assert what_counts(named, seq_length=SEQ, seed=5, train_samples=64, **splits) == [
        table, shares, epoch
    ]  # fmt: skip
    each = with_epochs(named, TrainConfig(train_epochs=1), seq_length=SEQ).epoch_samples
    assert each is not None
    most = 2**36 // each
    assert with_epochs(named, TrainConfig(train_epochs=most), seq_length=SEQ).epoch_samples == each
    with pytest.raises(ConfigError, match=f"--train-epochs {most + 1} of .*give at most {most}"):
        with_epochs(named, TrainConfig(train_epochs=most + 1), seq_length=SEQ)


def test_without_packing_a_row_has_one_sample(made: tuple[DataConfig, str]) -> None:
    data, prefix = made
    train = build(data, prefix, sft_packing=False).train
    assert isinstance(train, TuningDataset) and len(train) == 32
    assert all(len(train.numbers(row)) == 1 for row in range(32))


def test_what_is_too_long_is_cut_and_what_has_nothing_left_is_left_out(tmp_path: Path) -> None:
    """A cut answer has no end mark: the model does not learn to stop in the middle of a sentence."""
    long, short = talk("a", "b" * 50), talk("a" * 200, "b")
    data, prefix = tuned(tmp_path, [long, short, talk("a", "b")] * 4, template="chatml")
    datasets = build(data, prefix, seq_length=40, sft_packing=False)
    train = datasets.train
    assert isinstance(train, TuningDataset)
    kept = train.plan.kept  # of 10: 4 long, 3 short, 3 whole
    assert (len(kept.numbers), kept.cut, kept.weightless) == (7, 4, 3)
    rows = [train[row] for row in range(len(train))]
    cut = [s for s in rows if s.loss_mask is not None and s.loss_mask[-1] == 1.0]
    assert len(cut) == 4 and not any(259 in s.tokens[20:].tolist() for s in cut)
    (line,) = [line for line in overview(datasets) if "an epoch of" in line][:1]
    assert "7 samples of" in line and "4 are cut there, 3 left out" in line
    # cut when they were written: the same rows
    data, prefix = tuned(
        tmp_path / "cut", [long, short, talk("a", "b")] * 4, template="chatml", seq_length=40
    )
    assert len(MaskedDataset(prefix)) == 8
    again = MaskedDataset(prefix)
    assert {tuple(again[n].tolist()) for n in range(8)} == {
        tuple(MaskedDataset(str(tmp_path / "talks")).get(n, 0, min(41, length)).tolist())
        for n, length in enumerate(MaskedDataset(str(tmp_path / "talks")).sequence_lengths)
        if n % 3 != 1
    }


def test_a_blend_reads_rows_of_both(made: tuple[DataConfig, str], tmp_path: Path) -> None:
    data, prefix = made
    _, other = tuned(tmp_path, numbers(20), template="chatml")
    train = build(data, "0.75", prefix, "0.25", other, train_samples=16).train
    assert train is not None and len(train) == 16
    assert all(train[row].loss_mask is not None for row in range(16))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("gone", "the loss mask of .* are not there"),
        ("other", "has 20 sequences of .* 40 of .* the mask of another pair"),
        ("tokens", "holds uint16, no mask of uint8"),
        ("damaged", "holds 7, a mask 0 and 1"),
    ],
)
def test_a_mask_that_does_not_belong_is_refused(
    made: tuple[DataConfig, str], tmp_path: Path, spoil: str, said: str
) -> None:
    data, prefix = made
    mine = str(tmp_path / "mine")
    names = [mask_prefix(""), ""]
    for name, suffix in itertools.product(names, ("bin", "idx", "meta.json")):
        shutil.copy(f"{prefix}{name}.{suffix}", f"{mine}{name}.{suffix}")
    source = prefix
    if spoil == "other":
        _, other = tuned(tmp_path / "other", numbers(20), template="chatml")
        source = mask_prefix(other)
    for suffix in ("bin", "idx"):
        path = Path(f"{mask_prefix(mine)}.{suffix}")
        if spoil == "gone":
            path.unlink()
        elif spoil in ("other", "tokens"):
            shutil.copy(f"{source}.{suffix}", path)
        elif suffix == "bin":
            path.write_bytes(b"\x07" * path.stat().st_size)
    with pytest.raises(DataError, match=said):
        train = build(data, mine).train
        assert train is not None
        train[0]


def test_two_templates_in_one_run_are_refused(made: tuple[DataConfig, str], tmp_path: Path) -> None:
    data, prefix = made
    _, other = tuned(tmp_path, numbers(5), template="plain")
    blend = dataclasses.replace(data, data_path=[prefix, other])
    with pytest.raises(DataError, match="were written with two chat templates"):
        taught(blend)


def test_counting_over_blocks_is_counting_each(made: tuple[DataConfig, str]) -> None:
    source = MaskedDataset(made[1])
    for longest in (1, 2, 30, 10_000):
        counted = [int(source.mask(n, min(longest, len(source[n])))[1:].sum()) for n in range(40)]
        assert source.learned(3, 37, longest).tolist() == counted[3:37]
    plan = TuningPlan.draw_up(
        source, name="x", split="train", documents=DocumentRange(0, 40), num_samples=None,
        seq_length=SEQ, seed=1,
    )  # fmt: skip
    assert plan.kept.learned.sum() == source.learned(0, 40, SEQ + 1).sum()
