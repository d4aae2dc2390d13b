"""All-gathers of parameters: in the order of use, few at a time, whatever is waited for first."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_lite.blueprint.buckets import IN_FLIGHT
from megatron_lite.engines.gathering import Gathers


class Told:
    """A bucket that writes down what is asked of it."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def start_gather(self) -> None:
        """Begin."""
        self.said.append(f"start {self.name}")

    def finish_gather(self) -> None:
        """Wait."""
        self.said.append(f"end {self.name}")


def buckets(names: str) -> tuple[list[Any], list[str]]:
    """One for each letter, and what they were asked."""
    said: list[str] = []
    return [Told(name, said) for name in names], said


def test_each_wait_starts_the_next_but_one() -> None:
    made, said = buckets("abcd")
    gathers = Gathers()
    gathers.start(made)
    assert said == ["start a", "start b"]
    for bucket in (made[0], made[0], made[1], made[2], made[3]):
        gathers.wait_for(bucket)
    assert said[2:] == ["end a", "start c", "end b", "start d", "end c", "end d"]


@pytest.mark.parametrize("first", "abcd")
def test_what_is_waited_for_first_changes_no_order(first) -> None:
    made, said = buckets("abcd")
    gathers = Gathers()
    gathers.start(iter(made))
    gathers.wait_for(made["abcd".index(first)])
    assert [line for line in said if line.startswith("end")][-1] == f"end {first}"
    gathers.wait_for_all()
    for kind in ("start", "end"):
        assert [line for line in said if line.startswith(kind)] == [f"{kind} {n}" for n in "abcd"]
    flying = [sum(1 if s.startswith("start") else -1 for s in said[: n + 1]) for n in range(8)]
    assert max(flying) == IN_FLIGHT and flying[-1] == 0


def test_the_next_update_may_not_begin_before_all_is_there() -> None:
    made, _ = buckets("abc")
    gathers = Gathers()
    gathers.start(made)
    gathers.wait_for(made[1])
    with pytest.raises(AssertionError, match="still being gathered"):
        gathers.start(made)
    gathers.wait_for_all()
    gathers.start(made)
