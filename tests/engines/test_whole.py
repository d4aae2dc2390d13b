"""Shared weights are made whole in the order of use, two gathers ahead, and let go after."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_lite.blueprint.buckets import IN_FLIGHT
from megatron_lite.engines.whole import SharedLayer, WholeWeights


class Told:
    """A bucket of shared weights that writes down what is asked of it."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said
        self.is_whole, self.gathering = False, None

    def start_gather(self) -> None:
        """Begin."""
        assert not self.is_whole and self.gathering is None
        self.said.append(f"start {self.name}")
        self.gathering = self

    def finish_gather(self) -> None:
        """Wait."""
        assert self.gathering is not None
        self.said.append(f"end {self.name}")
        self.gathering, self.is_whole = None, True

    def let_go(self) -> None:
        """Free it."""
        assert self.is_whole
        self.said.append(f"free {self.name}")
        self.is_whole = False


class Pass:
    """Layers named by letters; pp: of a pipeline."""

    def __init__(self, names: str, *, pp: bool = False) -> None:
        self.said: list[str] = []
        self.buckets: list[Any] = [Told(name, self.said) for name in names]
        self.layers = {b.name: SharedLayer(0, [b]) for b in self.buckets}
        self.weights = WholeWeights(until_last_backward=pp)
        self.names = names
        self.flying: list[int] = []

    def run(self, *, backward: bool = True, last: bool = False) -> list[str]:
        """What is said in a micro batch; the first layer's backward reads nothing."""
        before = len(self.said)
        for name in self.names:
            self._use(name, backward=False, grad=backward)
        if last:
            self.weights.begin_last_backward(0)
        for name in self.names[:0:-1] if backward else ():
            self._use(name, backward=True, grad=False)
        if backward:
            self.weights.leave(self.layers[self.names[0]], backward=True)
        return self.said[before:]

    def _use(self, name: str, *, backward: bool, grad: bool) -> None:
        with torch.enable_grad() if grad else torch.no_grad():
            self.weights.use(self.layers[name], backward=backward)
            assert self.layers[name].shared[0].is_whole
            self.said.append(name + "'" * backward)
            self.flying.append(sum(bucket.gathering is not None for bucket in self.buckets))
            self.weights.leave(self.layers[name], backward=backward)


def begun_before_used(said: list[str]) -> bool:
    """Whether each layer's gather starts before the layer in front of it is used."""
    uses = [n for n, what in enumerate(said) if " " not in what]
    for earlier, later in zip(uses, uses[1:], strict=False):
        name = said[later].strip("'")
        starts = [n for n in range(later) if said[n] == f"start {name}"]
        if max(starts, default=-1) > earlier:
            return False
    return True


def test_from_the_second_micro_batch_on_gathers_are_begun_before_the_layer_in_front_is_used() -> (
    None
):
    one = Pass("abcde")
    first = one.run()
    assert not begun_before_used(first)
    second = one.run(last=True)
    assert begun_before_used(second)
    assert second.count("start e") == 1, "the last layer stays for its backward"
    assert second.count("start c") == 2
    assert max(one.flying) == IN_FLIGHT
    assert not any(bucket.is_whole or bucket.gathering for bucket in one.buckets)


def test_the_next_micro_batchs_first_layer_comes_under_the_last_backward_but_not_the_next_steps() -> (
    None
):
    one = Pass("abcd")
    one.run()
    assert not one.buckets[0].gathering, "nobody knows yet whether this was all"
    one.run()
    assert one.buckets[0].gathering, "a micro batch follows"
    one.run(last=True)
    assert one.buckets[0].gathering is None, "its values will be others"


def test_an_evaluation_gathers_nothing_for_a_backward() -> None:
    one = Pass("abcd")
    one.run(last=True)
    one.weights.let_go(one.buckets)
    said = one.run(backward=False)
    assert [s for s in said if s.startswith("start")] == [f"start {name}" for name in "abcd"]
    assert not any(bucket.is_whole or bucket.gathering for bucket in one.buckets)
    again = one.run(last=True)
    assert begun_before_used(again), "the order of training is still known"


def test_where_a_layer_has_several_buckets_so_many_are_in_flight_all_the_same() -> None:
    one = Pass("abcdef")
    one.layers = {
        name: SharedLayer(0, one.buckets[2 * n : 2 * n + 2]) for n, name in enumerate("abc")
    }
    one.names = "abc"
    for _ in range(3):
        one.run()
    assert max(one.flying) == IN_FLIGHT


def test_what_is_computed_again_is_no_part_of_an_evaluation() -> None:
    """Behind the last layer's backward its forward comes again: forward, but after a backward."""
    one = Pass("ab")
    for again in (True, False):
        one.run(backward=False)
        if again:
            for name, backward, grad in (
                ("b", True, False),
                ("b", False, True),
                ("b", True, False),
            ):
                one._use(name, backward=backward, grad=grad)
            one.weights.let_go(one.buckets)
    assert not any(bucket.is_whole or bucket.gathering for bucket in one.buckets)


def test_in_a_pipeline_weights_stay_until_the_last_backward() -> None:
    one = Pass("abcd", pp=True)
    first = one.run()
    assert not [s for s in first if s.startswith("free")]
    middle = one.run()
    assert not [s for s in middle if " " in s], "nothing is gathered again"
    last = one.run(last=True)
    assert [s for s in last if " " in s] == [f"free {name}" for name in "dcba"]
    one.weights.let_go(one.buckets)
    assert begun_before_used(one.run()), "the next step knows the order"


@pytest.mark.parametrize("pp", [False, True])
def test_what_changes_weights_finds_none_whole_or_in_flight(pp) -> None:
    one = Pass("abcd", pp=pp)
    one.run()
    one.weights.let_go(one.buckets)
    assert not any(bucket.is_whole or bucket.gathering for bucket in one.buckets)
