"""Verifies a token pair completely, and rebuilds the ones Megatron-DeepSpeed's --append-eod broke.

That tool writes one end-of-document token behind every document's tokens in .bin, but not into the
lengths in .idx: every document after the first is then read shifted.  The tokens themselves are
all there and in order, so the true lengths follow.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.config.blend import named_prefixes
from megatron_lite.config.errors import DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.indexed import (
    Index,
    IndexedDataset,
    bin_path,
    extra_tokens,
    idx_path,
    read_index,
)
from megatron_lite.data.masks import MASK_SUFFIX, mask_prefix
from megatron_lite.data.preparing.indexed_builder import IndexedDatasetBuilder
from megatron_lite.data.provenance import facts_path, maker_of, read_facts
from megatron_lite.storage.disk import Disk

_CHUNK = 1 << 22  # tokens looked at together
DOCUMENTS = 1 << 16  # documents rewritten together


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a complete reading of a pair found."""

    dtype: str
    documents: int
    empty_documents: int
    sequences: int
    tokens: int
    lowest: int
    highest: int
    ended_by_eod: int | None
    """Documents whose last token is the EOD; None where no EOD was named."""


def verify(
    prefix: str | os.PathLike[str], *, vocab_size: int | None = None, eod: int | None = None
) -> CheckReport:
    """Read every token; DataError for anything wrong, the first id outside the vocabulary included."""
    dataset = IndexedDataset(prefix)
    maker = maker_of(dataset)
    if maker is not None and maker.vocab_size is not None:  # no id is outside its own tokenizer
        vocab_size = min(maker.vocab_size, vocab_size or maker.vocab_size)
    tokens = _tokens(dataset)
    low, high = 0, -1
    for start in range(0, len(tokens), _CHUNK):
        part = tokens[start : start + _CHUNK]
        least, most = int(part.min()), int(part.max())
        if least < 0 or (vocab_size is not None and most >= vocab_size):
            wrong = (part < 0) | (part >= (most + 1 if vocab_size is None else vocab_size))
            at = start + int(wrong.argmax())
            _refuse_token(dataset, at, int(tokens[at]), vocab_size)
        low = least if start == 0 else min(low, least)
        high = max(high, most)
    bounds = dataset.document_indices
    empty = int(np.count_nonzero(_document_tokens(dataset) == 0))
    return CheckReport(
        dtype=str(dataset.dtype),
        documents=len(bounds) - 1,
        empty_documents=empty,
        sequences=len(dataset),
        tokens=len(tokens),
        lowest=low,
        highest=high,
        ended_by_eod=None if eod is None else _ended_by(dataset, tokens, eod),
    )


def check_hashes(prefix: str | os.PathLike[str]) -> bool:
    """Compare both files with the hashes in their .meta.json; False where none were recorded.

    Raises DataError naming the file that changed after it was written.
    """
    facts = facts_path(prefix)
    known = read_facts(prefix) or {}
    recorded = known.get("sha256")
    if recorded is None:
        return False
    _compare_hashes(prefix, recorded, facts)
    mask = known.get("loss_mask")
    if isinstance(mask, dict) and isinstance(mask.get("sha256"), dict):
        beside = mask_prefix(prefix)
        if IndexedDataset.exists(beside) and not str(prefix).endswith(MASK_SUFFIX):
            _compare_hashes(beside, mask["sha256"], facts)
    return True


def _compare_hashes(
    prefix: str | os.PathLike[str], recorded: Mapping[str, Any], facts: Path
) -> None:
    try:
        expected = {kind: str(recorded[kind]) for kind in ("bin", "idx")}
    except KeyError as error:
        raise DataError(f"{facts} has no hash of the .{error.args[0]} - copy it again") from error
    for kind, value in expected.items():
        with open(f"{prefix}.{kind}", "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 22):
                digest.update(chunk)
            actual = digest.hexdigest()
        if actual != value:
            raise DataError(
                f"{prefix}.{kind} has another SHA-256 ({actual[:16]}...) than {facts.name} recorded "
                f"({value[:16]}...) - it changed after it was written; copy it again"
            )


def verify_blends(data: DataConfig, *, vocab_size: int | None) -> list[str]:
    """Verify every pair a run reads (--verify-data); one line per pair, DataError for a bad one."""
    lines = []
    for prefix in sorted(named_prefixes(data)):
        report = verify(prefix, vocab_size=vocab_size)
        hashed = "hashes as recorded" if check_hashes(prefix) else "no hashes recorded"
        lines.append(f"verified {prefix}: {report.tokens:,} tokens, {hashed}")
    return lines


def _refuse_token(dataset: IndexedDataset, at: int, token: int, vocab_size: int | None) -> None:
    lengths = dataset.sequence_lengths
    sequence = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), at, side="right"))
    limit = "negative" if token < 0 else f"not below the vocabulary's {vocab_size} ids"
    raise DataError(
        f"{bin_path(dataset.prefix)}: token {at} (sequence {sequence}) is {token}, {limit} - "
        "preprocess again with the vocabulary the model will have"
    )


def _tokens(dataset: IndexedDataset) -> npt.NDArray[np.integer[Any]]:
    path = bin_path(dataset.prefix)
    if path.stat().st_size == 0:
        return np.empty(0, dataset.dtype)
    return np.memmap(path, dataset.dtype.newbyteorder("<"), "r")


def _document_tokens(dataset: IndexedDataset) -> npt.NDArray[np.int64]:
    """Tokens of every document."""
    ends = np.concatenate(([0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)))
    return np.diff(ends[dataset.document_indices])


def _ended_by(dataset: IndexedDataset, tokens: npt.NDArray[np.integer[Any]], eod: int) -> int:
    sizes = _document_tokens(dataset)
    lasts = np.cumsum(sizes)[sizes > 0] - 1
    return int(np.count_nonzero(tokens[lasts] == eod)) if len(lasts) else 0


def is_append_eod_pair(prefix: str | os.PathLike[str]) -> bool:
    """The pair's .bin has exactly one token more for each document than its .idx says."""
    index = read_index(idx_path(prefix))
    return extra_tokens(index, bin_path(prefix).stat().st_size) is not None


def repair(
    prefix: str | os.PathLike[str], out: str | os.PathLike[str], disk: Disk | None = None
) -> int:
    """Write the pair anew under `out` with the lengths it should have had; returns the EOD found.

    Raises DataError unless one and the same token follows every document.
    """
    if Path(bin_path(prefix)).resolve() == Path(bin_path(out)).resolve():
        raise DataError(f"--repair {out} is the broken pair itself - give another prefix")
    index = read_index(idx_path(prefix))
    if extra_tokens(index, bin_path(prefix).stat().st_size) is None:
        raise DataError(
            f"{prefix}: its .bin does not hold one more token for each document - it is not what "
            "--append-eod breaks, and nothing here can repair it"
        )
    tokens = np.memmap(bin_path(prefix), index.dtype.newbyteorder("<"), "r")
    lengths, counts = _true_lengths(index, len(tokens))
    lasts = np.cumsum(np.add.reduceat(lengths, np.cumsum(counts) - counts)) - 1
    eods = np.unique(tokens[lasts])
    if len(eods) != 1:
        raise DataError(
            f"{prefix}: {len(eods)} different tokens stand where the end-of-document token "
            f"should ({eods[:5].tolist()} ...) - it is not what --append-eod breaks"
        )
    with IndexedDatasetBuilder(f"{os.fspath(out)}.bin", index.dtype, disk) as builder:
        sequence, token = 0, 0
        for start in range(0, len(counts), DOCUMENTS):
            part = counts[start : start + DOCUMENTS]
            sizes = lengths[sequence : sequence + int(part.sum())]
            stop = token + int(sizes.sum())
            builder.add_documents(tokens[token:stop], sizes, part)
            sequence, token = sequence + len(sizes), stop
        builder.finalize(f"{os.fspath(out)}.idx")
    return int(eods[0])


def _true_lengths(index: Index, tokens: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Lengths of all sequences with the EODs, and sequences of every document.

    A document without sequences has one, of its EOD alone, if empty documents got one, too.
    """
    counts = np.diff(index.documents)
    lengths = index.lengths.astype(np.int64)
    empty_have_one = tokens - int(lengths.sum()) == len(counts)
    ends = index.documents[1:]
    if not empty_have_one:
        kept = counts > 0
        counts, ends = counts[kept], ends[kept]
        lengths[ends - 1] += 1
        return lengths, counts
    lengths[ends[counts > 0] - 1] += 1
    lengths = np.insert(lengths, ends[counts == 0], 1)
    return lengths, np.maximum(counts, 1)
