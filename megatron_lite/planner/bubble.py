"""How long a pipeline takes at least: the longest of a few paths through its schedule.

An action waits for the one before it on its rank and for what it is made of, so the time from the first
forward to the last backward is the length of the longest path along both kinds of waiting, and the
length of any path is a lower bound.  Those looked at here follow the first micro batch to a rank, then
that rank's list, and the last micro batch from there; and in 1F1B, whose messages nothing hides, every
pp-th micro batch there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from megatron_lite.blueprint.schedules import SCHEDULES
from megatron_lite.blueprint.schedules.actions import Action, Op
from megatron_lite.blueprint.stages import Placement
from megatron_lite.config.pipeline import SPLIT_BACKWARD

_What = tuple[Op, int]
"""What an action does, and of which stage."""

_Times = Mapping[_What, float]


@dataclass(frozen=True, slots=True)
class _Crossing:
    """The first of its kind on a rank, or the last: its place, and how much is before it, or after."""

    what: _What
    place: int
    beyond: tuple[tuple[_What, int], ...]


@dataclass(frozen=True, slots=True)
class _Row:
    """A rank's list: where the first micro batch's chain enters it, and the last one's leaves."""

    stages: tuple[int, ...]
    enters: tuple[_Crossing, ...]
    leaves: tuple[_Crossing, ...]


def least_span(
    name: str,
    placement: Placement,
    num_microbatches: int,
    seconds: Callable[[Op, int], float],
    latency: float,
) -> float:
    """Seconds from the first forward to the last backward are not less; mostly within a few percent.

    seconds: of one micro batch, F, and B or I and W, in a stage.
    """
    ops = _ops(name)
    stages = range(len(placement))
    times = {(op, stage): seconds(op, stage) for op in ops for stage in stages}
    rows = _rows(name, placement, _telling(name, placement, num_microbatches))
    work = [
        num_microbatches * sum(times[op, stage] for op in ops for stage in row.stages)
        for row in rows
    ]
    before = _beyond((crossing for row in rows for crossing in row.enters), times)
    after = _beyond((crossing for row in rows for crossing in row.leaves), times)
    chain = _chain(placement, ops[1])
    hops = [
        latency * (placement[one[1]] != placement[other[1]])
        for one, other in zip(chain, chain[1:], strict=False)
    ]
    heads, tails = _heads(chain, hops, times, before), _tails(chain, hops, times, after)
    longest = max(
        map(lambda row, whole: _through(row, whole, heads, tails, before, after), rows, work)
    )
    if name == "1f1b":
        longest = max(longest, _there_and_back(chain, hops, times, work, num_microbatches))
    return longest


def rough_span(
    name: str,
    placement: Placement,
    num_microbatches: int,
    seconds: Callable[[Op, int], float],
    latency: float,
) -> float:
    """A lower bound that needs no lists: the first micro batch's way to a rank, all of that rank's work,
    and, where backwards are not split, the last one's way back."""
    ops = _ops(name)
    work = [0.0] * (max(placement) + 1)
    ways: dict[int, float] = {}
    way = 0.0
    for stage, pp_rank in enumerate(placement):
        ways.setdefault(pp_rank, way)
        spent = [seconds(op, stage) for op in ops]
        work[pp_rank] += sum(spent)
        onwards = latency * (placement[stage] != placement[(stage + 1) % len(placement)])
        way += spent[0] + onwards
        if len(ops) == 2:
            way += spent[1] + onwards
    return max(ways[pp_rank] + num_microbatches * each for pp_rank, each in enumerate(work))


def _ops(name: str) -> tuple[Op, ...]:
    return (Op.F, Op.I, Op.W) if name in SPLIT_BACKWARD else (Op.F, Op.B)


def _telling(name: str, placement: Placement, num_microbatches: int) -> int:
    """So many show how the lists of more begin and end; gpipe has no steady phase."""
    if name == "gpipe":
        return num_microbatches
    return min(num_microbatches, 3 * (max(placement) + 1))


@lru_cache(maxsize=1024)
def _rows(name: str, placement: Placement, num_microbatches: int) -> tuple[_Row, ...]:
    lists = SCHEDULES[name].generate(placement, num_microbatches).lists
    crossing = frozenset(_ops(name)[:2])
    return tuple(
        _Row(
            tuple(stage for stage, there in enumerate(placement) if there == pp_rank),
            tuple(_crossings(actions, crossing)),
            tuple(
                _Crossing(one.what, len(actions) - 1 - one.place, one.beyond)
                for one in _crossings(actions[::-1], crossing)
            ),
        )
        for pp_rank, actions in enumerate(lists)
    )


def _crossings(actions: tuple[Action, ...], ops: frozenset[Op]) -> Iterator[_Crossing]:
    """Each kind's first action."""
    seen: dict[_What, int] = {}
    for place, (op, stage, _) in enumerate(actions):
        if op in ops and (op, stage) not in seen:
            yield _Crossing((op, stage), place, tuple(seen.items()))
        seen[op, stage] = seen.get((op, stage), 0) + 1


def _beyond(crossings: Iterator[_Crossing], times: _Times) -> dict[_What, float]:
    return {one.what: sum(count * times[what] for what, count in one.beyond) for one in crossings}


def _chain(placement: Placement, back: Op) -> list[_What]:
    """What a micro batch goes through."""
    stages = range(len(placement))
    return [*((Op.F, stage) for stage in stages), *((back, stage) for stage in reversed(stages))]


def _heads(
    chain: list[_What], hops: list[float], times: _Times, before: _Times
) -> dict[_What, float]:
    """What lies before the first of each kind: its micro batch's way there, or other work of a rank."""
    heads, at = {}, 0.0
    for what, hop in zip(chain, (0.0, *hops), strict=True):
        heads[what] = at = max(at + hop, before[what])
        at += times[what]
    return heads


def _tails(
    chain: list[_What], hops: list[float], times: _Times, after: _Times
) -> dict[_What, float]:
    """What lies behind the last of each kind."""
    tails, at = {}, 0.0
    for what, hop in zip(reversed(chain), (0.0, *reversed(hops)), strict=True):
        tails[what] = at = max(at + hop, after[what])
        at += times[what]
    return tails


def _through(
    row: _Row, whole: float, heads: _Times, tails: _Times, before: _Times, after: _Times
) -> float:
    """The longest path along a rank's list, which has so much work."""
    found = 0.0
    for enters in row.enters:
        gained = heads[enters.what] - before[enters.what]
        for leaves in row.leaves:
            if enters.place <= leaves.place:
                found = max(found, gained + whole + tails[leaves.what] - after[leaves.what])
    return found


def _there_and_back(
    chain: list[_What], hops: list[float], times: _Times, work: list[float], num_microbatches: int
) -> float:
    """Every pp-th micro batch through all stages, between them the rank with the most work."""
    rounds, rest = divmod(num_microbatches - 1, len(work))
    if not rounds:
        return 0.0
    around = sum(times[what] for what in chain) + sum(hops)
    return (rounds + 1) * around + rest * max(work) / num_microbatches
