"""Samples of fixed length cut from a stream of shuffled documents, in Megatron's exact order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError
from megatron_lite.data.cache import Arrays, build_or_load
from megatron_lite.data.indices import document_index, plan_epochs, sample_index, shuffle_index
from megatron_lite.storage.disk import Disk

Tokens = npt.NDArray[np.int64]


class Samples(Protocol):
    """What a loader reads: a number of samples of seq_length + 1 tokens each."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, sample: int, /) -> Tokens: ...


class TokenSource(Protocol):
    """Documents by number: an IndexedDataset or synthetic ones."""

    @property
    def sequence_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of every document."""
        ...

    def get(
        self, index: int, offset: int = 0, length: int | None = None
    ) -> npt.NDArray[np.integer[Any]]:
        """`length` tokens (the rest by default) of a document from token `offset` on."""
        ...

    def fingerprint(self) -> str:
        """Names the content: equal for equal documents only."""
        ...


class Range(NamedTuple):
    """Documents start to stop - 1 of a file."""

    start: int
    stop: int


def split_ranges(shares: Sequence[float], num_documents: int) -> list[Range | None]:
    """Documents of train, validation and test; None for a share of 0.

    shares sum to 1; bounds are their running sums times the documents, rounded half to even.
    """
    bounds = [0.0]
    for share in shares:
        bounds.append(bounds[-1] + share)
    ranges: list[Range | None] = []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        start = int(round(begin * float(num_documents)))
        stop = int(round(end * float(num_documents)))
        ranges.append(Range(start, stop) if end > begin else None)
    return ranges


class GPTDataset:
    """Samples of seq_length + 1 tokens across document borders, in Megatron's order.

    num_samples: at least so many samples, from as many epochs as that takes; None: one epoch.
    `dataset[i]` is int64 [s + 1]; its last token is the first of the sample that follows in the
    stream.  Token ids are checked against vocab_size when they are read.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        name: str,
        split: str,
        documents: Range,
        num_samples: int | None,
        seq_length: int,
        seed: int,
        vocab_size: int | None = None,
        cache_folder: str | os.PathLike[str] | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.source = source
        self.name = name
        self.split = split
        self.documents = documents
        self.seq_length = seq_length
        self.seed = seed
        self.vocab_size = vocab_size
        total = len(source.sequence_lengths)
        if documents.stop <= documents.start:
            raise DataError(
                f"{name}: split {split} of {total} documents has 0 documents - give it a larger "
                "share in --split, or ask for no samples of it (--eval-iters 0)"
            )
        lengths = source.sequence_lengths[documents.start : documents.stop]
        self.tokens_per_epoch = int(lengths.sum(dtype=np.int64))
        if self.tokens_per_epoch == 0:
            raise DataError(
                f"{name}: the {len(lengths)} documents of split {split} have no tokens - "
                "use other data or another --split"
            )
        self.plan = plan_epochs(self.tokens_per_epoch, seq_length, num_samples)
        if self.plan.samples == 0:
            raise DataError(
                f"{name}: split {split} has {self.tokens_per_epoch} tokens, one sample needs "
                f"{seq_length + 1} - use more data or a smaller --seq-length"
            )
        key = {
            "kind": "gpt",
            "source": source.fingerprint(),
            "documents": list(documents),
            "plan": [self.plan.epochs, self.plan.samples, self.plan.separate_last],
            "seq_length": seq_length,
            "seed": seed,
        }
        arrays = build_or_load(cache_folder, key, self._build, Disk() if disk is None else disk)
        self.document_index = arrays["documents"]
        self.sample_index = arrays["samples"]
        self.shuffle_index = arrays["shuffle"]

    def _build(self) -> Arrays:
        # one RandomState, consumed in this order: documents, then samples
        random = np.random.RandomState(self.seed)
        numbers = np.arange(self.documents.start, self.documents.stop, dtype=np.int32)
        documents = document_index(numbers, self.plan, random)
        samples = sample_index(
            self.source.sequence_lengths, documents, self.seq_length, self.plan.samples
        )
        return {
            "documents": documents,
            "samples": samples,
            "shuffle": shuffle_index(self.plan, random),
        }

    @property
    def epochs(self) -> int:
        """Times every document of the split is read."""
        return self.plan.epochs

    def __len__(self) -> int:
        return self.plan.samples

    def __getitem__(self, sample: int) -> Tokens:
        if not 0 <= sample < len(self):
            raise IndexError(f"{self.name}: no sample {sample}, it has {len(self)}")
        row = int(self.shuffle_index[sample])
        first, begin = (int(value) for value in self.sample_index[row])
        last, end = (int(value) for value in self.sample_index[row + 1])
        if first == last:
            parts = [self.source.get(int(self.document_index[first]), begin, end - begin + 1)]
        else:
            parts = [self.source.get(int(self.document_index[first]), begin)]
            parts += [self.source.get(int(d)) for d in self.document_index[first + 1 : last]]
            parts.append(self.source.get(int(self.document_index[last]), 0, end + 1))
        tokens = np.concatenate(parts).astype(np.int64)
        if len(tokens) != self.seq_length + 1:
            raise DataError(
                f"{self.name}: sample {sample} has {len(tokens)} tokens, not "
                f"{self.seq_length + 1} - the files changed under an index made before; start anew"
            )
        self._check_range(sample, tokens)
        return tokens

    def _check_range(self, sample: int, tokens: Tokens) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or (self.vocab_size is not None and high >= self.vocab_size):
            wrong = low if low < 0 else high
            raise DataError(
                f"{self.name}: sample {sample} of split {self.split} holds token id {wrong}, the "
                f"vocabulary has {self.vocab_size} - use the vocabulary the data was made with"
            )
