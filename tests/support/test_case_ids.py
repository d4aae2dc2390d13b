"""A case's name is short and the same at each run."""

from __future__ import annotations

import gzip
from types import SimpleNamespace

import pytest

from tests.conftest import pytest_collection_modifyitems
from tests.support.case_ids import CASE, VALUE, case, shortened, too_long


@pytest.mark.parametrize("value", [1, "short", b"\0", ["[" * 5000], None])
def test_what_is_short_or_no_text_names_itself(value: object) -> None:
    assert shortened(value, "argument") is None


def test_a_long_text_is_named_by_its_beginning_and_bytes_by_their_argument() -> None:
    for long in ("[" * 5000, "wide " + "字" * 30, "two\nlines " * 9):
        name = shortened(long, "text")
        assert name is not None and len(name) <= VALUE + 1 and name.endswith("..")
        assert name.isascii() and name.isprintable()
    assert shortened(gzip.compress(b"a text" * 9), "content") == "content"


def test_a_case_that_is_too_long_is_found_with_its_test() -> None:
    good, bad = f"test_a[{'x' * CASE}]", f"test_b[{'x' * CASE}y]"
    assert case("test_a") == "" and case("test_a[b[c]]") == "b[c]"
    assert too_long(["test_" + "x" * 200, good]) == []
    (found,) = too_long([good, bad])
    assert found.startswith("test_b[") and f"({len(bad)})" in found


def test_a_run_with_such_a_case_ends_before_it_begins() -> None:
    item = SimpleNamespace(name=f"test_b[{'x' * CASE}y]")
    with pytest.raises(pytest.UsageError, match=r"1 cases .* give them an id: test_b\[x"):
        pytest_collection_modifyitems([item])  # type: ignore[list-item]
