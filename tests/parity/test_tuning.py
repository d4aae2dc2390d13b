"""Tuning on answers: every layout's losses and gradients are those of one process."""

import dataclasses

import pytest

from tests.parity.compare import compare, passes
from tests.parity.tuning import MORE, WIDE


@pytest.mark.parametrize(
    "entry",
    [
        *(pytest.param(entry, marks=pytest.mark.ci) for entry in MORE),
        *(pytest.param(entry, marks=pytest.mark.slow) for entry in WIDE),
    ],
    ids=lambda entry: entry.name,
)
def test_equals_the_serial_run(entry) -> None:
    difference = compare(entry)
    assert passes(entry, difference), dataclasses.asdict(difference)
