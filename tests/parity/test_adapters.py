"""Adapters: every layout's losses and gradients of A and B are those of one process."""

import dataclasses

import pytest

from tests.parity.adapters import MORE, QUICK, WIDE
from tests.parity.compare import compare, passes


@pytest.mark.parametrize(
    "entry",
    [
        *QUICK,
        *(pytest.param(entry, marks=pytest.mark.ci) for entry in MORE),
        *(pytest.param(entry, marks=pytest.mark.slow) for entry in WIDE),
    ],
    ids=lambda entry: entry.name,
)
def test_equals_the_serial_run(entry) -> None:
    difference = compare(entry)
    assert passes(entry, difference), dataclasses.asdict(difference)
