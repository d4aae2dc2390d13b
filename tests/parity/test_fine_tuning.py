"""Fine-tuning: every layout's losses and gradients are those of one process, of adapters and of answers."""

import dataclasses

import pytest

from tests.parity import adapters, tuning
from tests.parity.compare import compare, passes


@pytest.mark.parametrize(
    "entry",
    [
        *adapters.QUICK,
        *(pytest.param(entry, marks=pytest.mark.ci) for entry in (*adapters.MORE, *tuning.MORE)),
        *(pytest.param(entry, marks=pytest.mark.slow) for entry in (*adapters.WIDE, *tuning.WIDE)),
    ],
    ids=lambda entry: entry.name,
)
def test_equals_the_serial_run(entry) -> None:
    difference = compare(entry)
    assert passes(entry, difference), dataclasses.asdict(difference)
