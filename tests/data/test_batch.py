"""A micro batch of records: what samples say of themselves, beside what the flags ask of EOD tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.batch import collate
from megatron_lite.data.documents import DocumentEnds
from megatron_lite.data.samples import Sample

TOKENS = np.array([5, 9, 9, 6, 7, 9])
PACKED = Sample(TOKENS, segments=np.array([0, 3, 5], np.int32))
NUMBERS = np.arange(2) + 40


def test_a_samples_own_segments_go_before_its_eod_tokens() -> None:
    ends = DocumentEnds(eod=9, reset_attention_mask=True)
    batch = collate([PACKED, Sample(TOKENS)], NUMBERS, ends)
    assert batch.segments is not None and batch.segments.dtype == np.int32
    assert batch.segments.tolist() == [0, 3, 5, 7, 8, 10] and batch.longest_segment == 3
    # positions begin anew where nothing before is seen; after an EOD only if the flag asks
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    unasked = collate([PACKED, Sample(TOKENS)], NUMBERS)
    assert unasked.segments is not None and unasked.segments.tolist() == [0, 3, 5, 10]
    plain = collate([Sample(TOKENS)] * 2, NUMBERS)
    assert plain.segments is None and plain.positions is None and plain.longest_segment == 5


def test_a_samples_own_loss_mask_and_that_of_eod_tokens_both_count() -> None:
    own = Sample(TOKENS, loss_mask=np.array([0, 1, 1, 1, 0], np.float32))
    ends = DocumentEnds(eod=9, eod_mask_loss=True)
    assert collate([own, Sample(TOKENS)], NUMBERS).loss_mask.tolist() == [[0, 1, 1, 1, 0], [1] * 5]
    assert collate([own], NUMBERS[:1], ends).loss_mask.tolist() == [[0, 0, 0, 1, 0]]


def test_extras_are_stacked() -> None:
    samples = [
        Sample(TOKENS, extras={"rewards": np.full((2, 3), n, np.float32), "id": np.array(n)})
        for n in (1, 2)
    ]
    extras = collate(samples, NUMBERS).extras
    assert extras["rewards"].shape == (2, 2, 3) and extras["rewards"].dtype == np.float32
    assert extras["id"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Sample(TOKENS[:4]), r"tokens of sample 41 are int64 \[4\], of sample 40 int64 \[6\]"),
        (Sample(TOKENS, extras={"a": np.zeros(2)}), r"sample 41 has the extras \['a'\], .* 40 none"),
        (Sample(TOKENS, segments=np.array([0, 3], np.int32)), r"sample 41: its segments \[0, 3\]"),
        (Sample(TOKENS, segments=np.array([0, 3, 3, 5], np.int32)), "rise from 0 to the 5 tokens"),
        (Sample(TOKENS, segments=np.array([1, 5], np.int32)), "rise from 0 to the 5 tokens"),
    ],
    ids=["length", "extras", "short segments", "an empty segment", "late segments"],
)  # fmt: skip
def test_samples_that_do_not_fit_together_are_named(other: Sample, words: str) -> None:
    with pytest.raises(DataError, match=words):
        collate([Sample(TOKENS), other], NUMBERS)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            [np.zeros(2), np.zeros(3)],
            r"a of sample 41 are float64 \[3\], of sample 40 float64 \[2\]",
        ),
        ([np.zeros(2), np.zeros(2, np.float32)], "are float32"),
        ([np.array("text"), np.array("text")], "a of sample 40 are of type <U4, not numbers"),
    ],
    ids=["shape", "format", "text"],
)
def test_extras_that_cannot_be_stacked_are_named(values: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        collate([Sample(TOKENS, extras={"a": value}) for value in values], NUMBERS)


def test_flags_about_ends_need_an_eod() -> None:
    data = DataConfig(reset_attention_mask=True, eod_mask_loss=True)
    with pytest.raises(ConfigError, match="--eod-mask-loss, --reset-attention-mask: the tokenizer"):
        DocumentEnds.from_config(data, None)
    assert DocumentEnds.from_config(data, 3) == DocumentEnds(
        eod=3, eod_mask_loss=True, reset_attention_mask=True
    )
    assert DocumentEnds.from_config(DataConfig(), None) == DocumentEnds()
