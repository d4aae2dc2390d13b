"""The bytes are Megatron's; what is broken is named; names appear only when files are complete."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config.errors import DataError, StorageError
from megatron_lite.data.indexed import HEADER, IndexedDataset, token_dtype
from megatron_lite.data.preparing.indexed_builder import IndexedDatasetBuilder
from megatron_lite.storage.faults import FaultyDisk, RecordingDisk, SimulatedCrash
from tests.support.extras import needs

DOCUMENTS = [[11, 12, 13, 50256], [21, 22, 50256], [31, 32, 33, 34, 50256]]
GOLDEN_BIN = "0b000c000d0050c41500160050c41f0020002100220050c4"
GOLDEN_IDX = (
    "4d4d4944494458000001000000000000000803000000000000000400000000000000"
    "040000000300000005000000000000000000000008000000000000000e00000000000000"
    "0000000000000000010000000000000002000000000000000300000000000000"
)


def write(prefix: Path, documents: list[list[int]], dtype: object = np.uint16) -> Path:
    with IndexedDatasetBuilder(f"{prefix}.bin", dtype) as builder:  # type: ignore[arg-type]
        for document in documents:
            builder.add_document(np.array(document, np.int64), [len(document)] if document else [])
        builder.finalize(f"{prefix}.idx")
    return prefix


def change(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def test_bytes_are_megatrons(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    assert Path(f"{prefix}.bin").read_bytes().hex() == GOLDEN_BIN
    idx = Path(f"{prefix}.idx").read_bytes()
    assert idx.hex() == GOLDEN_IDX
    golden = "a0f36eb2d41fae44730b192eab5e12309fbd9432d5f2617eab3366ecc32e9bac"
    assert hashlib.sha256(idx).hexdigest() == golden
    golden = "bc35d075b25d7f63e4c36ad28996f70268d8fb38436e48f50d1ee046fe981143"
    assert hashlib.sha256(Path(f"{prefix}.bin").read_bytes()).hexdigest() == golden


@pytest.mark.parametrize("mmap_bin", [True, False])
def test_reader_gives_sequences_slices_and_parts(tmp_path: Path, mmap_bin: bool) -> None:
    ds = IndexedDataset(write(tmp_path / "a", DOCUMENTS), mmap_bin=mmap_bin)
    assert len(ds) == 3 and ds.dtype == np.uint16
    assert [sequence.tolist() for sequence in ds] == DOCUMENTS
    assert [sequence.tolist() for sequence in ds[1:3]] == DOCUMENTS[1:]
    assert ds[2:1] == [] and ds[-1].tolist() == DOCUMENTS[2]
    assert ds.get(2, 1, 2).tolist() == [32, 33] and ds.get(2, offset=3).tolist() == [34, 50256]
    assert ds.sequence_lengths.tolist() == ds.sizes.tolist() == [4, 3, 5]
    assert ds.document_indices.tolist() == ds.doc_idx.tolist() == [0, 1, 2, 3]
    for bad in (lambda: ds[3], lambda: ds.get(0, 2, 3), lambda: ds.get(0, -1, 1)):
        with pytest.raises(IndexError):
            bad()
    with pytest.raises(ValueError, match="step 1"):
        ds[::2]
    again = pickle.loads(pickle.dumps(ds))
    assert again[1].tolist() == DOCUMENTS[1] and again.mmap_bin == mmap_bin
    assert IndexedDataset.exists(ds.prefix) and not IndexedDataset.exists(tmp_path / "b")


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 65535), max_size=6), max_size=4), max_size=12
    ),
    dtype=st.sampled_from([np.uint16, np.int32, np.int64]),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], dtype: type
) -> None:
    prefix = tmp_path_factory.mktemp("round") / "a"
    with IndexedDatasetBuilder(f"{prefix}.bin", dtype) as builder:
        for document in documents[::2]:
            for sequence in document:
                builder.add_item(np.array(sequence, np.int64))
            builder.end_document()
        rest = documents[1::2]
        flat = [token for document in rest for sequence in document for token in sequence]
        builder.add_documents(
            np.array(flat, np.int64),
            [len(sequence) for document in rest for sequence in document],
            [len(document) for document in rest],
        )
        builder.finalize()
    ds = IndexedDataset(prefix)
    order = documents[::2] + documents[1::2]
    assert [s.tolist() for s in ds[:]] == [sequence for document in order for sequence in document]
    assert np.diff(ds.document_indices).tolist() == [len(document) for document in order]


def test_merging_equals_writing_at_once(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS[:1])
    write(tmp_path / "b", [*DOCUMENTS[1:], []])
    with IndexedDatasetBuilder(tmp_path / "ab.bin", np.uint16) as builder:
        builder.add_index(tmp_path / "a")
        builder.merge_file_(tmp_path / "b")
        builder.finalize(tmp_path / "ab.idx")
    write(tmp_path / "all", [*DOCUMENTS, []])
    for kind in ("bin", "idx"):
        merged, whole = tmp_path / f"ab.{kind}", tmp_path / f"all.{kind}"
        assert merged.read_bytes() == whole.read_bytes()
    with (
        IndexedDatasetBuilder(tmp_path / "c.bin", np.int32) as builder,
        pytest.raises(DataError, match="uint16.*int32"),
    ):
        builder.add_index(tmp_path / "a")


def test_names_appear_only_when_complete_and_the_index_last(tmp_path: Path) -> None:
    disk = RecordingDisk()
    with IndexedDatasetBuilder(tmp_path / "a.bin", np.uint16, disk) as builder:
        builder.add_document([1, 2], [2])
        assert not IndexedDataset.exists(tmp_path / "a")
        builder.finalize()
    kinds = [operation.kind for operation in disk.operations]
    renames = [o.target.name for o in disk.operations if o.kind == "rename" and o.target]
    assert renames == ["a.bin", "a.idx"]
    assert kinds.count("fsync") == 2 and "fsync" not in kinds[kinds.index("rename") :]
    with IndexedDatasetBuilder(tmp_path / "b.bin", np.uint16) as builder:
        builder.add_document([1, 2], [2])
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]


def test_a_fault_at_any_operation_leaves_nothing_or_the_pair(tmp_path: Path) -> None:
    def attempt(folder: Path, disk: FaultyDisk) -> None:
        folder.mkdir()
        with IndexedDatasetBuilder(folder / "a.bin", np.uint16, disk) as builder:
            builder.add_document([1, 2], [2])
            builder.finalize()

    recorded = RecordingDisk()
    with IndexedDatasetBuilder(tmp_path / "x.bin", np.uint16, recorded) as builder:
        builder.add_document([1, 2], [2])
        builder.finalize()
    for k in range(len(recorded.operations)):
        with pytest.raises(StorageError, match="No space left"):
            attempt(tmp_path / f"full{k}", FaultyDisk(fail_at=k, error=errno.ENOSPC, tear=True))
        with pytest.raises(SimulatedCrash):
            attempt(tmp_path / f"crash{k}", FaultyDisk(fail_at=k, crash="raise", tear=True))
        for kind in ("full", "crash"):
            names = os.listdir(tmp_path / f"{kind}{k}")
            if "a.idx" in names:
                assert IndexedDataset(tmp_path / f"{kind}{k}" / "a")[0].tolist() == [1, 2]
        assert not [name for name in os.listdir(tmp_path / f"full{k}") if "partial" in name]


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "magic": (lambda p: change(p / "a.idx", 0, b"TNTIDX"), "expected b'MMIDIDX"),
    "version": (lambda p: change(p / "a.idx", 9, struct.pack("<Q", 2)), "version 2, expected 1"),
    "float": (lambda p: change(p / "a.idx", 17, b"\x06"), "floating point"),
    "dtype": (lambda p: change(p / "a.idx", 17, b"\x63"), "dtype code 99"),
    "count": (lambda p: change(p / "a.idx", 18, struct.pack("<Q", 1 << 60)), "102 bytes, expected"),
    "empty": (lambda p: (p / "a.idx").write_bytes(b"") and None, "0 bytes"),
    "short": (lambda p: os.truncate(p / "a.idx", 101), "101 bytes, expected 102"),
    "header": (lambda p: os.truncate(p / "a.idx", 20), "20 bytes, but the header"),
    "trailing": (lambda p: os.truncate(p / "a.idx", 104), "104 bytes, expected 102"),
    "modes": (lambda p: os.truncate(p / "a.idx", 105), "multimodal"),
    "length": (lambda p: change(p / "a.idx", 34, struct.pack("<i", -1)), "has length -1"),
    "pointer": (lambda p: change(p / "a.idx", 54, struct.pack("<q", 6)), "byte 6, not 8"),
    "first": (lambda p: change(p / "a.idx", 70, struct.pack("<q", 1)), "from 1 .. 3, expected 0"),
    "last": (lambda p: change(p / "a.idx", 94, struct.pack("<q", 9)), "0 .. 9, expected 0 .. 3"),
    "order": (lambda p: change(p / "a.idx", 78, struct.pack("<q", 7)), "is 2, below 7"),
    "bin byte": (lambda p: os.truncate(p / "a.bin", 23), "23 bytes, expected 24"),
    "bin token": (lambda p: os.truncate(p / "a.bin", 22), "22 bytes, expected 24"),
    "bin empty": (lambda p: os.truncate(p / "a.bin", 0), "0 bytes, expected 24"),
    "bin longer": (lambda p: os.truncate(p / "a.bin", 26), "26 bytes, expected 24"),
    "no bin": (lambda p: os.remove(p / "a.bin"), "a.bin does not exist"),
    "no idx": (lambda p: os.remove(p / "a.idx"), "prefix"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_pair_is_refused_by_name_with_expected_and_actual(
    tmp_path: Path, case: str
) -> None:
    write(tmp_path / "a", DOCUMENTS)
    damage, message = BROKEN[case]
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)


def test_pairs_of_megatron_deepspeeds_append_eod_are_recognised(tmp_path: Path) -> None:
    """The tokens hold every EOD, the lengths none: what its encoder writes."""
    write(tmp_path / "short", [document[:-1] for document in DOCUMENTS])
    write(tmp_path / "long", DOCUMENTS)
    os.replace(tmp_path / "long.bin", tmp_path / "short.bin")
    with pytest.raises(DataError, match="12 tokens, its index 9.*Megatron-DeepSpeed.*append-eod"):
        IndexedDataset(tmp_path / "short")


def test_the_builder_refuses_what_would_be_wrong(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "a.bin", np.uint16) as builder:
        for wrong, message in [
            (lambda: builder.add_document([1, 2, 9], [2]), "end-of-document token counts"),
            (lambda: builder.add_document([1, 65536], [2]), "65536 does not fit uint16"),
            (lambda: builder.add_document([-1], [1]), "-1 does not fit uint16"),
            (lambda: builder.add_document([1.5], [1]), "integers, not float64"),
        ]:
            with pytest.raises(DataError, match=message):
                wrong()
        builder.add_item([1])
        with pytest.raises(DataError, match="after the last end_document"):
            builder.finalize()
    assert os.listdir(tmp_path) == []
    with pytest.raises(DataError, match="float32 is no token type"):
        IndexedDatasetBuilder(tmp_path / "a.bin", np.float32)


def test_token_dtype_follows_megatrons_rule() -> None:
    assert token_dtype(65499) == np.uint16 and token_dtype(65500) == np.int32
    assert token_dtype(None) == np.int32


def test_the_fingerprint_changes_with_the_content(tmp_path: Path) -> None:
    ds = IndexedDataset(write(tmp_path / "a", DOCUMENTS))
    before = ds.fingerprint()
    assert before == ds.fingerprint()
    write(tmp_path / "a", [*DOCUMENTS, [1]])
    assert IndexedDataset(tmp_path / "a").fingerprint() != before


def test_header_has_34_bytes() -> None:
    assert HEADER.size == 34


def test_megatron_core_reads_ours_and_writes_the_same(tmp_path: Path) -> None:
    oracle = needs("megatron.core.datasets.indexed_dataset")
    import torch

    documents = [[[1, 2, 3], [4]], [], [[65535], [7, 8]]]
    theirs = oracle.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    with IndexedDatasetBuilder(tmp_path / "ours.bin", np.uint16) as ours:
        for document in documents:
            flat = [token for sequence in document for token in sequence]
            lengths = [len(sequence) for sequence in document]
            theirs.add_document(torch.tensor(flat, dtype=torch.int64), lengths)
            ours.add_document(np.array(flat, np.int64), lengths)
        ours.finalize()
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for kind in ("bin", "idx"):
        expected = (tmp_path / f"theirs.{kind}").read_bytes()
        assert (tmp_path / f"ours.{kind}").read_bytes() == expected
    read = oracle.IndexedDataset(str(tmp_path / "ours"))
    ds = IndexedDataset(tmp_path / "theirs")
    assert [x.tolist() for x in read[0 : len(read)]] == [x.tolist() for x in ds]
    assert read.document_indices.tolist() == ds.document_indices.tolist()
