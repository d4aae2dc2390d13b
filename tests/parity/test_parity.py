"""Parallel equals serial in every layout of the table; and the comparison can fail."""

import dataclasses

import pytest

from tests.parity.compare import compare, passes
from tests.parity.layouts import MORE, QUICK, layout


@pytest.mark.parametrize(
    "entry",
    [*QUICK, *(pytest.param(entry, marks=pytest.mark.ci) for entry in MORE)],
    ids=lambda entry: entry.name,
)
def test_equals_the_serial_run(entry):
    difference = compare(entry)
    assert passes(entry, difference), dataclasses.asdict(difference)


@pytest.mark.parametrize(
    "changes",
    [{"train__global_batch_size": 6}, {"train__seed": 7}, {"model__hidden_dropout": 0.2}],
    ids=["a lost micro batch", "another seed", "another dropout rate"],
)
def test_the_table_notices(changes):
    wrong = layout("wrong", **changes)
    assert not passes(wrong, compare(wrong))
