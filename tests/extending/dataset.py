"""A kind of dataset from outside the package, which an objective of --extend asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_lite.data.build import Datasets, build_datasets
from megatron_lite.data.samples import Sample, Samples
from megatron_lite.data.sources import DATASETS, DatasetKind


def reversed_sample(sample: Sample) -> Sample:
    """The last token first, and with each input how far along it is."""
    tokens = sample.tokens[::-1].copy()
    along = np.linspace(0.0, 1.0, len(tokens) - 1, dtype=np.float32)
    return Sample(tokens, extras={"along": along})


@dataclass(frozen=True, slots=True)
class Reversed:
    """Another dataset read from the end of each sample."""

    inner: Samples

    @property
    def name(self) -> str:
        """Names it in messages."""
        return f"reversed {self.inner.name}"

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, sample: int) -> Sample:
        return reversed_sample(self.inner[sample])

    def content(self) -> str:
        """Names what is read."""
        return f"reversed {self.inner.content()}"


def build(*arguments: Any, **named: Any) -> Datasets:
    """As datasets for pretraining, each turned round."""
    plain = build_datasets(*arguments, **named)
    turned = {
        split: Reversed(found)
        for split in ("train", "valid", "test")
        if (found := getattr(plain, split)) is not None
    }
    return replace(plain, **turned)


def example(seq_length: int) -> Sample:
    """Its form, before there is one."""
    return reversed_sample(Sample(np.zeros(seq_length + 1, dtype=np.int64)))


DATASETS["reversed"] = DatasetKind(build, example)
