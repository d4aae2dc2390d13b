"""Damaged, changing and strange data files end in words with the right class, never in a signal."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.config.errors import DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.build import Datasets, build_datasets
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.maps import FileMaps
from megatron_lite.data.overview import overview, shares
from megatron_lite.data.preparing.indexed_builder import IndexedDatasetBuilder
from tests.data.conftest import WriteDocuments
from tests.data.fuzz_index import fuzz
from tests.support.spawn import spawn


def build(paths: list[str], cache: Path | None, samples: int = 40, **other: Any) -> Datasets:
    settings: dict[str, Any] = dict(split="1") | other
    return build_datasets(
        DataConfig(data_path=paths, **settings),
        seq_length=16,
        seed=1,
        train_samples=samples,
        valid_samples=0,
        test_samples=0,
        vocab_size=100,
        eod=99,
        cache_folder=cache,
    )


def test_two_seconds_of_fuzzing_find_nothing() -> None:
    tried, accepted = fuzz(2.0, seed=1)
    assert tried > 500 and accepted < tried / 10


@pytest.mark.slow
def test_a_minute_of_fuzzing_finds_nothing() -> None:
    fuzz(60.0, seed=2)


@pytest.mark.parametrize("change", [-1, -2, "half", +2, "all"])
def test_a_bin_of_another_size_is_refused_with_both_sizes(
    write_documents: WriteDocuments, change: int | str
) -> None:
    prefix = write_documents("a", 30)
    path = Path(f"{prefix}.bin")
    size = path.stat().st_size
    new = {"half": size // 2, "all": 0}.get(str(change), 0)
    if isinstance(change, int):
        new = size + change
    os.truncate(path, new)
    with pytest.raises(DataError, match=f"{new} bytes, expected {size}"):
        build([str(prefix)], None)


@pytest.mark.parametrize("mmap_bin", [True, False])
def test_a_bin_cut_while_it_is_read_is_an_error_and_no_signal(
    write_documents: WriteDocuments, mmap_bin: bool
) -> None:
    prefix = write_documents("a", 3000)
    train = build([str(prefix)], None, samples=1000, mmap_bin_files=mmap_bin).train
    assert train is not None and len(train[0].tokens) == 17
    os.truncate(f"{prefix}.bin", 4096)
    with pytest.raises(DataError, match="a.bin was cut to 4096 bytes while it was in use"):
        for sample in range(1000):
            train[sample]


def test_a_flipped_bit_never_gives_a_token_outside_the_vocabulary(
    write_documents: WriteDocuments,
) -> None:
    random = np.random.default_rng(0)
    prefix = write_documents("a", 40)
    originals = {kind: Path(f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx")}
    refused = 0
    for flip in range(100):
        for kind, original in originals.items():
            data = bytearray(original)
            if kind == ("bin", "idx")[flip % 2]:
                data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
            Path(f"{prefix}.{kind}").write_bytes(data)
        try:
            train = build([str(prefix)], None).train
            assert train is not None
            for sample in range(40):
                tokens = train[sample].tokens
                assert tokens.min() >= 0 and tokens.max() < 100
        except DataError as error:
            assert "/a" in str(error)
            refused += 1
    assert refused > 50


def broken_pair(prefix: Path, documents: list[list[list[int]]], eod: int) -> list[list[int]]:
    """A pair as --append-eod leaves it; returns the sequences that were meant."""
    with IndexedDatasetBuilder(f"{prefix}.bin", np.uint16) as builder:
        for document in documents:
            builder.add_document(sum(document, []), [len(sequence) for sequence in document])
        builder.finalize(f"{prefix}.idx")
    tokens: list[int] = []
    meant: list[list[int]] = []
    for document in documents:
        if document:
            tokens += [*sum(document, []), eod]
            meant += [*document[:-1], [*document[-1], eod]]
    Path(f"{prefix}.bin").write_bytes(np.array(tokens, np.uint16).tobytes())
    return meant


@pytest.mark.parametrize(
    "documents",
    [
        [[[11, 12, 13]], [[21, 22]], [[31, 32, 33, 34]]],
        [[[1], [2, 3]], [[4, 5], [6], [7]]],
        [[[1, 2]], [], [[3]], []],
    ],
    ids=["one sequence each", "several", "with empty documents"],
)
def test_append_eod_pairs_are_recognised_and_repaired(
    tmp_path: Path, documents: list[list[list[int]]]
) -> None:
    from megatron_lite.data.preparing.check import is_append_eod_pair, repair, verify

    meant = broken_pair(tmp_path / "a", documents, 9)
    assert is_append_eod_pair(tmp_path / "a")
    with pytest.raises(DataError, match="--append-eod.*check_dataset.py .*/a --repair OUT"):
        build([str(tmp_path / "a")], None)
    assert repair(tmp_path / "a", tmp_path / "b") == 9
    report = verify(tmp_path / "b", eod=9, vocab_size=40)
    filled = [document for document in documents if document]
    assert report.documents == report.ended_by_eod == len(filled)
    assert [s.tolist() for s in IndexedDataset(tmp_path / "b")[:]] == meant
    assert not is_append_eod_pair(tmp_path / "b")


def test_only_what_append_eod_breaks_is_repaired(tmp_path: Path) -> None:
    from megatron_lite.data.preparing.check import repair

    broken_pair(tmp_path / "a", [[[1, 2]], [[3, 4]]], 9)
    path = tmp_path / "a.bin"
    tokens = np.frombuffer(path.read_bytes(), np.uint16).copy()
    tokens[-1] = 8
    path.write_bytes(tokens.tobytes())
    with pytest.raises(DataError, match="2 different tokens stand where"):
        repair(tmp_path / "a", tmp_path / "b")
    path.write_bytes(tokens[:-1].tobytes())
    with pytest.raises(DataError, match="does not hold one more token for each document"):
        repair(tmp_path / "a", tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]


def test_an_empty_dataset_is_refused_and_does_not_loop(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "a.bin", np.uint16) as builder:
        builder.finalize(tmp_path / "a.idx")
    assert (tmp_path / "a.bin").stat().st_size == 0
    with pytest.raises(DataError, match="split train of 0 documents has 0 documents"):
        build([str(tmp_path / "a")], None)


def test_a_dataset_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.idx does not exist"):
        build([str(tmp_path / "nowhere")], None)


def test_few_files_are_open_however_many_there_are(write_documents: WriteDocuments) -> None:
    maps = FileMaps(limit=3)
    datasets = [IndexedDataset(write_documents(f"d{k}", 5, seed=k), maps=maps) for k in range(10)]
    before = len(os.listdir("/proc/self/fd"))
    kept = [dataset[0].tolist() for dataset in datasets]
    assert len(maps) == 3 and len(os.listdir("/proc/self/fd")) == before + 3
    held = [dataset[0] for dataset in datasets]  # an array outlives its place among the maps
    assert [array.tolist() for array in held] == kept


def test_threads_share_few_maps(write_documents: WriteDocuments) -> None:
    maps = FileMaps(limit=2)
    datasets = [IndexedDataset(write_documents(f"d{k}", 20, seed=k), maps=maps) for k in range(6)]
    expected = [[dataset[i].tolist() for i in range(20)] for dataset in datasets]
    wrong: list[int] = []

    def read(seed: int) -> None:
        for k, i in np.random.default_rng(seed).integers(0, (6, 20), (400, 2)):
            if datasets[k][i].tolist() != expected[k][i]:
                wrong.append(int(k))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _start_together(rank: int, ranks: int, folder: str) -> list[int]:
    import torch.distributed as dist

    digests = []
    for repeat in range(20):
        dist.barrier()
        cache = Path(folder) / f"cache{repeat}"
        made = build(["0.3", f"{folder}/a", "0.7", f"{folder}/b"], cache)
        assert made.train is not None
        total = sum(int(made.train[i].tokens.sum()) for i in range(len(made.train)))
        digests += [made.digest, total]
    return digests


def test_ranks_that_start_together_read_the_same(
    write_documents: WriteDocuments, tmp_path: Path
) -> None:
    write_documents("a", 60, 1)
    write_documents("b", 60, 2)
    first, *others = spawn(_start_together, 3, str(tmp_path))
    assert all(other == first for other in others)
    assert len(set(first[::2])) == 1
    assert not [name for name in os.listdir(tmp_path / "cache0") if "partial" in name]


def test_the_digest_knows_content_and_not_places(
    write_documents: WriteDocuments, tmp_path: Path
) -> None:
    a = write_documents("a", 60, 1)
    (tmp_path / "other").mkdir()
    for kind in ("bin", "idx"):
        data = Path(f"{a}.{kind}").read_bytes()
        (tmp_path / "other" / f"a.{kind}").write_bytes(data)
    digest = build([str(a)], None).digest
    assert build([str(tmp_path / "other" / "a")], tmp_path / "cache").digest == digest
    assert build([str(write_documents("b", 60, 2))], None).digest != digest
    changed = bytearray((tmp_path / "other" / "a.bin").read_bytes())
    changed[0] ^= 1
    (tmp_path / "other" / "a.bin").write_bytes(changed)
    assert build([str(tmp_path / "other" / "a")], None).digest != digest


def test_the_table_says_weights_samples_tokens_and_epochs(write_documents: WriteDocuments) -> None:
    a, b = str(write_documents("a", 300, 1)), str(write_documents("b", 40, 2))
    made = build(["1", a, "3", b], None, samples=80)
    assert made.train is not None
    found = shares(made.train)
    assert [share.samples for share in found] == [20, 60]
    assert [share.asked for share in found] == [share.achieved for share in found] == [0.25, 0.75]
    tokens = int(IndexedDataset(b).sequence_lengths.sum())
    assert found[1].tokens == 60 * 16 and found[1].epochs == pytest.approx(60 * 16 / tokens)
    lines = overview(made)
    assert len(lines) == 4 and lines[1].split()[-5:-2] == ["0.25000", "0.25000", "20"]
    assert lines[3].split() == ["all", "80", "1280"]
    single = build([a], None, samples=7)
    assert single.train is not None and overview(single)[1].split()[-3:-1] == ["7", "112"]
