"""Parallel equals serial in every layout of the table; and the comparison can fail."""

import dataclasses
import re

import pytest

from tests.parity.compare import compare, passes
from tests.parity.layouts import LAYOUTS, MORE, QUICK, RULES, TRANSLATED, WIDE, WRONG
from tests.support.engines import OF_EVERY_LAYOUT
from tests.support.places import ROOT


@pytest.mark.parametrize("engine", OF_EVERY_LAYOUT)
@pytest.mark.parametrize(
    "entry",
    [
        *QUICK,
        *(pytest.param(entry, marks=pytest.mark.ci) for entry in MORE),
        *(pytest.param(entry, marks=pytest.mark.slow) for entry in (*WIDE, *RULES)),
    ],
    ids=lambda entry: entry.name,
)
def test_equals_the_serial_run(entry, engine) -> None:
    difference = compare(entry, engine)
    assert passes(entry, difference), dataclasses.asdict(difference)


COMPILED = [
    *((entry, "aot_eager") for entry in QUICK),
    *((entry, "inductor") for entry in LAYOUTS if entry.name in TRANSLATED),
]


@pytest.mark.parametrize(
    ("entry", "backend"),
    [
        pytest.param(
            entry, backend, id=f"{entry.name}-{backend}",
            marks=pytest.mark.ci if entry.name == "tp2-sp" else pytest.mark.slow,
        )
        for entry, backend in COMPILED
    ],
)  # fmt: skip
def test_equals_the_serial_run_with_its_pieces_compiled(entry, backend) -> None:
    difference = compare(entry, compile_by=backend)
    assert passes(entry, difference), dataclasses.asdict(difference)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda entry: entry.name)
def test_the_table_notices(wrong) -> None:
    assert not passes(wrong, compare(wrong))


def test_the_document_shows_layouts_of_the_table() -> None:
    """`make parity-all` writes it; a layout that came since then has no row yet."""
    text = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| \d+ \| .* \| (yes|\*\*no\*\*) \|$", text, re.M)
    equal = {name for name, verdict in rows if verdict == "yes"}
    assert len(equal) >= 48 and equal <= {entry.name for entry in LAYOUTS}
    assert {name for name, verdict in rows if verdict != "yes"} == {entry.name for entry in WRONG}
