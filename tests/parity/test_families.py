"""Parallel equals serial with what each family has beyond the figures of the large table."""

import dataclasses

import pytest

from tests.parity.compare import compare, passes
from tests.parity.families import FAMILY_LAYOUTS


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, marks=pytest.mark.slow if number else pytest.mark.ci)
        for entries in FAMILY_LAYOUTS.values()
        for number, entry in enumerate(entries)
    ],
    ids=lambda entry: entry.name,
)
def test_equals_the_serial_run(entry) -> None:
    difference = compare(entry)
    assert passes(entry, difference), dataclasses.asdict(difference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry", [entries[0] for entries in FAMILY_LAYOUTS.values()], ids=lambda entry: entry.name
)
def test_equals_the_serial_run_with_its_pieces_compiled(entry) -> None:
    difference = compare(entry, compile_by="aot_eager")
    assert passes(entry, difference), dataclasses.asdict(difference)
