"""Parallel equals serial in every layout of the table; and the comparison can fail."""

import dataclasses

import pytest

from tests.parity.compare import compare, passes
from tests.parity.layouts import MORE, QUICK, WIDE, WRONG


@pytest.mark.parametrize(
    "entry",
    [
        *QUICK,
        *(pytest.param(entry, marks=pytest.mark.ci) for entry in MORE),
        *(pytest.param(entry, marks=pytest.mark.slow) for entry in WIDE),
    ],
    ids=lambda entry: entry.name,
)
def test_equals_the_serial_run(entry):
    difference = compare(entry)
    assert passes(entry, difference), dataclasses.asdict(difference)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda entry: entry.name)
def test_the_table_notices(wrong):
    assert not passes(wrong, compare(wrong))
