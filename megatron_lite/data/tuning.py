"""PackedRows of whole samples, each with a mask of what is learned: what a model is tuned on.

    [ question answer | question answer | question answer | padding ]     segments; positions restart
      0        1..1     0        1..1     0        1..1      0            the mask

A sample longer than a row is cut, and one of which nothing is then learned is left out.  In every
epoch other samples share a row, and the rows come in another order: both follow from the seed and
the epoch's number, whatever the length of the run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError
from megatron_lite.data.cache import Arrays
from megatron_lite.data.masks import MaskedDataset
from megatron_lite.data.packing import PackedRows, pack_rows, rows_alone
from megatron_lite.data.pretrain import DocumentRange, TokenSource
from megatron_lite.data.samples import Sample, require_in_vocabulary

_Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ReadSamples:
    """The samples of a range that are read: numbers, tokens, learned tokens; what was cut or left out."""

    numbers: _Int64
    lengths: _Int64
    learned: _Int64
    cut: int
    weightless: int


def read_of(source: MaskedDataset, documents: DocumentRange, seq_length: int) -> ReadSamples:
    """Those of which something is learned in their first seq_length + 1 tokens."""
    start, stop = documents
    whole = source.sequence_lengths[start:stop].astype(np.int64)
    learned = source.learned(start, stop, seq_length + 1)
    here = learned > 0
    lengths = np.minimum(whole, seq_length + 1)
    cut = int(np.count_nonzero(here & (whole > lengths)))
    numbers = np.arange(start, stop, dtype=np.int64)[here]
    return ReadSamples(numbers, lengths[here], learned[here], cut, int(np.count_nonzero(~here)))


def nothing_learned(
    source: TokenSource, documents: DocumentRange, seq_length: int, num_samples: int | None
) -> str:
    """Why these samples make no row, in words; "" where they do."""
    assert isinstance(source, MaskedDataset), source
    if len(read_of(source, documents, seq_length).numbers):
        return ""
    return (
        f"has {documents.stop - documents.start} samples, and in the first {seq_length + 1} tokens of "
        "each nothing is learned"
    )


@dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """Which rows of one file's split are asked for, before any array of it is built.

    pad: what fills a row that is not full; no loss counts there.
    """

    source: MaskedDataset
    name: str
    split: str
    documents: DocumentRange
    kept: ReadSamples
    num_samples: int | None
    seq_length: int
    seed: int
    vocab_size: int | None
    packing: bool
    pad: int
    parts: tuple[str, ...] = field(default=("ranked", "slots", "bounds", "order"), init=False)

    @staticmethod
    def draw_up(
        source: MaskedDataset,
        *,
        name: str,
        split: str,
        documents: DocumentRange,
        num_samples: int | None,
        seq_length: int,
        seed: int,
        vocab_size: int | None = None,
        packing: bool = True,
        pad: int = 0,
    ) -> TuningPlan:
        """At least num_samples rows, from as many epochs as that takes; None: one epoch.

        Raises DataError for a split in which nothing is learned.
        """
        if why := nothing_learned(source, documents, seq_length, num_samples):
            raise DataError(
                f"{name}: split {split} {why} - give it a larger share in --split, or raise --seq-length"
            )
        kept = read_of(source, documents, seq_length)
        return TuningPlan(
            source=source, name=name, split=split, documents=documents, kept=kept,
            num_samples=num_samples, seq_length=seq_length, seed=seed, vocab_size=vocab_size,
            packing=packing, pad=pad,
        )  # fmt: skip

    @functools.cached_property
    def rows(self) -> PackedRows:
        """Of one epoch: which ranks by length share a row."""
        falling = np.sort(self.kept.lengths)[::-1]
        return pack_rows(falling, self.seq_length + 1) if self.packing else rows_alone(len(falling))

    @property
    def epochs(self) -> int:
        """Times every sample is read."""
        return max(1, -(-(self.num_samples or 0) // len(self.rows)))

    def __len__(self) -> int:
        return self.epochs * len(self.rows)

    def key(self) -> dict[str, Any]:
        """All that the arrays depend on."""
        return {
            "source": self.source.fingerprint(),
            "documents": list(self.documents),
            "plan": [self.epochs, self.packing],
        }

    def build(self) -> Arrays:
        """ranked [epochs, n]: the samples, the longest first; which of them a row holds; rows in order."""
        # one RandomState, consumed epoch by epoch: a longer run begins as a shorter one
        random = np.random.RandomState(self.seed)
        rows, ranked, order = self.rows, [], []
        for _ in range(self.epochs):
            drawn = random.permutation(len(self.kept.numbers))
            falling = np.argsort(-self.kept.lengths[drawn], kind="stable")
            ranked.append(self.kept.numbers[drawn[falling]])
            order.append(random.permutation(len(rows)).astype(np.int64))
        return {
            "ranked": np.stack(ranked), "slots": rows.slots, "bounds": rows.bounds,
            "order": np.concatenate(order),
        }  # fmt: skip

    def dataset(self, arrays: Arrays) -> TuningDataset:
        """arrays: what build() gives, from a cache perhaps."""
        return TuningDataset(self, arrays)


class TuningDataset:
    """PackedRows of seq_length + 1 tokens, an epoch after the other."""

    def __init__(self, plan: TuningPlan, arrays: Arrays) -> None:
        self.plan, self.source, self.name = plan, plan.source, plan.name
        self._ranked: _Int64 = arrays["ranked"]
        self._rows = PackedRows(arrays["slots"], arrays["bounds"])
        self._order: _Int64 = arrays["order"]

    def __len__(self) -> int:
        return len(self._order)

    def content(self) -> str:
        """What the files hold."""
        return self.source.content()

    def numbers(self, sample: int) -> list[int]:
        """The samples of the file that share a row."""
        epoch, row = sample // len(self._rows), int(self._order[sample])
        begin, end = (int(bound) for bound in self._rows.bounds[row : row + 2])
        return [int(number) for number in self._ranked[epoch, self._rows.slots[begin:end]]]

    def __getitem__(self, sample: int) -> Sample:
        if not 0 <= sample < len(self):
            raise IndexError(f"{self.name}: no sample {sample}, it has {len(self)}")
        length = self.plan.seq_length
        tokens = np.full(length + 1, self.plan.pad, np.int64)
        learned = np.zeros(length + 1, np.float32)
        borders, place = [0], 0
        for number in self.numbers(sample):
            size = min(int(self.source.sequence_lengths[number]), length + 1)
            tokens[place : place + size] = self.source.get(number, 0, size)
            learned[place + 1 : place + size] = self.source.mask(number, size)[1:]
            place += size
            borders.append(min(place, length))
        plan = self.plan
        require_in_vocabulary(tokens, plan.vocab_size, f"{self.name}: sample {sample} of split "
                              f"{plan.split}")  # fmt: skip
        segments = np.unique(np.array([*borders, length], np.int32))  # rising; the last is padding
        return Sample(tokens, learned[1:], segments)
