"""Samples of fixed length cut from a stream of shuffled documents, in Megatron's exact order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError
from megatron_lite.data.cache import Arrays
from megatron_lite.data.indices import (
    EpochPlan,
    document_index,
    plan_epochs,
    sample_index,
    shuffle_index,
)
from megatron_lite.data.samples import Sample, require_in_vocabulary


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

    def content(self) -> str:
        """The same for copies that lie elsewhere."""
        ...


class DocumentRange(NamedTuple):
    """Documents start to stop - 1 of a file."""

    start: int
    stop: int


def split_ranges(shares: Sequence[float], num_documents: int) -> list[DocumentRange | None]:
    """Documents of train, validation and test; None for a share of 0.

    shares sum to 1; bounds are their running sums times the documents, rounded half to even.
    """
    bounds = [0.0]
    for share in shares:
        bounds.append(bounds[-1] + share)
    ranges: list[DocumentRange | None] = []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        start = int(round(begin * float(num_documents)))
        stop = int(round(end * float(num_documents)))
        ranges.append(DocumentRange(start, stop) if end > begin else None)
    return ranges


def shortage(
    source: TokenSource, documents: DocumentRange, seq_length: int, num_samples: int | None
) -> str:
    """Why these documents do not make one sample, in words; "" where they do, read again if need be."""
    total = len(source.sequence_lengths)
    lengths = source.sequence_lengths[documents.start : documents.stop]
    if len(lengths) == 0:
        return f"of {total} documents has 0 documents"
    tokens = int(lengths.sum(dtype=np.int64))
    if tokens == 0:
        return f"has no tokens in its {len(lengths)} documents"
    if plan_epochs(tokens, seq_length, num_samples).samples == 0:
        return f"has {tokens} tokens, one sample needs {seq_length + 1}"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTPlan:
    """Which samples of one file's split are asked for, before any array of it is built."""

    source: TokenSource
    name: str
    split: str
    documents: DocumentRange
    tokens_per_epoch: int
    epochs: EpochPlan
    seq_length: int
    seed: int
    vocab_size: int | None
    parts: tuple[str, ...] = field(default=("documents", "samples", "shuffle"), init=False)

    @staticmethod
    def draw_up(
        source: TokenSource,
        *,
        name: str,
        split: str,
        documents: DocumentRange,
        num_samples: int | None,
        seq_length: int,
        seed: int,
        vocab_size: int | None = None,
    ) -> GPTPlan:
        """At least num_samples samples, from as many epochs as that takes; None: one epoch.

        Raises DataError for a split without documents or tokens, or shorter than one sample.
        """
        if why := shortage(source, documents, seq_length, num_samples):
            raise DataError(
                f"{name}: split {split} {why} - give it a larger share in --split, "
                "use more data or a smaller --seq-length"
            )
        lengths = source.sequence_lengths[documents.start : documents.stop]
        tokens = int(lengths.sum(dtype=np.int64))
        return GPTPlan(
            source=source,
            name=name,
            split=split,
            documents=documents,
            tokens_per_epoch=tokens,
            epochs=plan_epochs(tokens, seq_length, num_samples),
            seq_length=seq_length,
            seed=seed,
            vocab_size=vocab_size,
        )

    def __len__(self) -> int:
        return self.epochs.samples

    def key(self) -> dict[str, Any]:
        """All that the arrays depend on."""
        return {
            "source": self.source.fingerprint(),
            "documents": list(self.documents),
            "plan": [self.epochs.epochs, self.epochs.samples, self.epochs.separate_last],
        }

    def build(self) -> Arrays:
        """The document, sample and shuffle index."""
        # one RandomState, consumed in this order: documents, then samples
        random = np.random.RandomState(self.seed)
        numbers = np.arange(self.documents.start, self.documents.stop, dtype=np.int32)
        documents = document_index(numbers, self.epochs, random)
        samples = sample_index(
            self.source.sequence_lengths, documents, self.seq_length, self.epochs.samples
        )
        shuffle = shuffle_index(self.epochs, random)
        return {"documents": documents, "samples": samples, "shuffle": shuffle}

    def dataset(self, arrays: Arrays) -> GPTDataset:
        """arrays: what build() gives, from a cache perhaps."""
        return GPTDataset(self, arrays)


class GPTDataset:
    """Samples of seq_length + 1 tokens across document borders, in Megatron's order.

    The last token of `dataset[i]` is the first of the sample that follows in the stream.  Token ids
    are checked against vocab_size when they are read.
    """

    def __init__(self, plan: GPTPlan, arrays: Arrays) -> None:
        self.plan = plan
        self.source = plan.source
        self.name = plan.name
        self.split = plan.split
        self.seq_length = plan.seq_length
        self.vocab_size = plan.vocab_size
        self.document_index = arrays["documents"]
        self.sample_index = arrays["samples"]
        self.shuffle_index = arrays["shuffle"]

    @property
    def epochs(self) -> int:
        """Times every document of the split is read."""
        return self.plan.epochs.epochs

    def __len__(self) -> int:
        return len(self.plan)

    def content(self) -> str:
        """What the file holds."""
        return self.source.content()

    def __getitem__(self, sample: int) -> Sample:
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
        require_in_vocabulary(
            tokens, self.vocab_size, f"{self.name}: sample {sample} of split {self.split}"
        )
        return Sample(tokens)
