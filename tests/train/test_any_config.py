"""Any configuration is refused before anything starts, with a way out, or trains to the serial numbers.

The cases are functions of their seeds (any_config.draw); a failing one is printed as a command line.
"""

from __future__ import annotations

import pytest

from tests.train.any_config import (
    EVERY_PAIR,
    EVERY_REASON,
    draw,
    pairs,
    refusal,
    unhelpful,
    verdict,
)

TRAINED, REFUSED, ALL = 24, 6, 200
"""In CI the cases with the most pairs of features, and some refusals; locally 200 in all."""

IN_CI = (*EVERY_PAIR[:TRAINED], *EVERY_REASON[:REFUSED])
LOCALLY = (*EVERY_PAIR[TRAINED:], *EVERY_REASON[REFUSED:])
CHOSEN = {*IN_CI, *LOCALLY}
PLAIN = [seed for seed in range(ALL) if seed not in CHOSEN][: ALL - len(CHOSEN)]


@pytest.mark.parametrize(
    "seed",
    [
        *(pytest.param(seed, marks=pytest.mark.ci) for seed in IN_CI),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in (*LOCALLY, *PLAIN)),
    ],
)
def test_any_configuration_is_refused_or_trains_as_the_serial_run(seed: int) -> None:
    print(f"seed {seed}")
    verdict(draw(seed))


def test_every_refusal_names_a_flag_and_a_way_out() -> None:
    refused = 0
    for seed in (*range(500), *EVERY_REASON):
        case = draw(seed)
        message = refusal(case)
        if message is not None:
            refused += 1
            assert not unhelpful(message), f"{case.command}\n{message}"
    assert refused > 100, "draws that are never refused show nothing"


def test_every_pair_of_features_that_is_ever_accepted_is_among_the_trained_ones() -> None:
    trained = frozenset().union(*(pairs(draw(seed)) for seed in EVERY_PAIR))
    for seed in EVERY_PAIR:
        assert refusal(draw(seed)) is None, f"{seed} is refused now: choose anew"
    for case in map(draw, range(500)):
        if refusal(case) is None:
            new = pairs(case) - trained
            assert not new, f"{case.seed}: {new}; python -m tests.train.any_config choose"


ALONE = {
    # one pipeline rank has one stage
    ("pp1", "interleaved"), ("pp1", "zb-v"), ("pp1", "2 chunks"), ("pp1", "3 chunks"),
    ("pp1", "layers per chunk"),
    # what autograd adds up cannot be postponed
    ("zb-h1", "--no-gradient-accumulation-fusion"), ("zb-v", "--no-gradient-accumulation-fusion"),
    # both ends of a V are on the first rank; equal chunks are not uneven
    ("zb-v", "uneven end"), ("layers per chunk", "uneven end"),
    # slices of a group's input are kept where it is whole on every tp rank
    ("--distribute-saved-activations", "tp1"),
    ("--distribute-saved-activations", "--sequence-parallel"),
    ("--overlap-param-gather", "--no-overlap-grad-reduce"),
}  # fmt: skip
"""Two features that are refused whatever else is asked: all others go together."""


def test_only_named_pairs_of_features_are_always_refused() -> None:
    sizes = ("pp", "tp", "dp", "--group-query")  # they divide the ranks, or do not
    together: dict[frozenset[str], bool] = {}
    often: dict[frozenset[str], int] = {}
    for case in map(draw, range(900)):
        good = refusal(case) is None
        for pair in pairs(case):
            together[pair] = together.get(pair, False) or good
            often[pair] = often.get(pair, 0) + 1
    apart = {frozenset(pair) for pair in ALONE}
    for pair, good in together.items():
        if pair in apart:
            assert not good, f"{set(pair)} is accepted"
        elif often[pair] > 12 and not any(name.startswith(sizes) for name in pair):
            assert good, f"{set(pair)} was refused {often[pair]} times"
