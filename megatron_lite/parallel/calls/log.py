"""A rank's communication calls in order, and whether the call logs of all ranks match."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Call(NamedTuple):
    """One collective, or one end of a message.

    op: all-reduce, all-gather, reduce-scatter, all-to-all, barrier, send or receive.
    axis, ranks: the group's name and members; of a message sender and receiver.
    shape: of the whole tensor: what an all-gather makes, what a reduce-scatter is given.
    what: the reduction (sum, max), or which message it is.
    place: where in the step; step: position in the rank's list of actions, None outside it.
    line: the line of this package that made it.
    """

    op: str
    axis: str
    ranks: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    element_bytes: int
    what: str
    place: str
    step: int | None
    line: str

    @property
    def payload(self) -> int:
        """Bytes of the whole tensor."""
        size = self.element_bytes
        for n in self.shape:
            size *= n
        return size

    @property
    def sent(self) -> float:
        """Bytes this rank sends for it, with ring algorithms."""
        if self.op == "send":
            return float(self.payload)
        passes = 2 if self.op == "all-reduce" else int(self.op in _ONE_PASS)
        return passes * self.payload * (len(self.ranks) - 1) / len(self.ranks)

    @property
    def form(self) -> tuple[str, tuple[int, ...], str, str]:
        """What must be the same on both sides."""
        return self.op, self.shape, self.dtype, self.what

    def __str__(self) -> str:
        what = f" ({self.what})" if self.what else ""
        return f"{self.op}{what} {list(self.shape)} {self.dtype} in {self.line}"


MESSAGE_OPS = ("send", "receive")
_ONE_PASS = ("all-gather", "reduce-scatter", "all-to-all")


@dataclass(slots=True)
class CallLog:
    """All calls of a rank in order; failed_at: what ended it early, None where it came to its end.

    pp: the rank's place in the pipeline; ranks of one place have the same list of actions.
    """

    rank: int
    pp: int = 0
    calls: list[Call] = field(default_factory=list)
    failed_at: str | None = None

    def sent_bytes(self, part: str) -> dict[str, float]:
        """Axis -> bytes this rank sends over it with ring algorithms, in one part of the run."""
        sums: dict[str, float] = defaultdict(float)
        for call in self.calls:
            if call.place.startswith(part):
                sums[call.axis] += call.sent
        return dict(sums)


@dataclass(frozen=True, slots=True)
class MatchedCalls:
    """What matches: collectives (each counted once), groups, messages and pairs of ranks."""

    ranks: int
    collectives: int
    groups: int
    messages: int
    pairs: int


def compare_calls(logs: Sequence[CallLog]) -> tuple[MatchedCalls, list[str]]:
    """What matches and, in words, what does not: empty if the calls of these ranks match.

    Every group's members make the same calls in the same order with the same shapes; between two
    ranks the k-th send meets the k-th receive; all come to their end even if each call blocks until
    the others have made it.  Ranks without a log are taken to do their part, and so are
    those that broke off from there on.
    """
    by_rank = {log.rank: log for log in logs}
    wrong = [f"rank {t.rank} breaks off: {t.failed_at}" for t in logs if t.failed_at]
    groups = _by_group(logs)
    for (axis, ranks), calls in groups.items():
        wrong += _compare_group(axis, ranks, calls, by_rank)
    messages = _by_pair(logs)
    for (source, target), (sends, receives) in messages.items():
        if source in by_rank and target in by_rank:
            wrong += _compare_pair(by_rank[source], by_rank[target], sends, receives)
    if not wrong:
        wrong = _stuck(logs)
    both = [sends for (a, b), (sends, _) in messages.items() if a in by_rank and b in by_rank]
    return (
        MatchedCalls(
            ranks=len(by_rank),
            collectives=sum(max(map(len, calls.values())) for calls in groups.values()),
            groups=len(groups),
            messages=sum(map(len, both)),
            pairs=len(both),
        ),
        wrong,
    )


_Group = tuple[str, tuple[int, ...]]
_Groups = dict[_Group, dict[int, list[Call]]]


def _by_group(logs: Sequence[CallLog]) -> _Groups:
    """Group -> member with a call log -> its collectives there, none for one that never calls."""
    groups: _Groups = {}
    for log in logs:
        for call in log.calls:
            if call.op not in MESSAGE_OPS:
                members = groups.setdefault((call.axis, call.ranks), {})
                members.setdefault(log.rank, []).append(call)
    for (_, ranks), members in groups.items():
        for log in logs:
            if log.rank in ranks:
                members.setdefault(log.rank, [])
    return groups


def _compare_group(
    axis: str, ranks: tuple[int, ...], calls: Mapping[int, list[Call]],
    by_rank: Mapping[int, CallLog],
) -> Iterator[str]:  # fmt: skip
    """The first difference of the members to most of them, one line for each that differs."""
    whole = [rank for rank in calls if not by_rank[rank].failed_at] or list(calls)
    forms = {rank: tuple(call.form for call in calls[rank]) for rank in whole}
    usual = Counter(forms.values()).most_common(1)[0][0]
    model = next(rank for rank, form in forms.items() if form == usual)
    for rank, made in calls.items():
        if rank == model:
            continue
        same_list = by_rank[rank].pp == by_rank[model].pp
        at = _first_difference(calls[model], made, places_too=same_list)
        if at is not None and not (at == len(made) and by_rank[rank].failed_at):
            yield _group_difference(axis, ranks, at, (model, calls[model]), (rank, made))


def _first_difference(one: list[Call], other: list[Call], *, places_too: bool) -> int | None:
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a.form != b.form or (places_too and (a.place, a.line) != (b.place, b.line)):
            return at
    return min(len(one), len(other)) if len(one) != len(other) else None


def _group_difference(
    axis: str,
    ranks: tuple[int, ...],
    at: int,
    one: tuple[int, list[Call]],
    other: tuple[int, list[Call]],
) -> str:
    sides = "; ".join(
        f"rank {rank}, {made[at].place}: {made[at]}"
        if at < len(made)
        else f"rank {rank}: nothing more"
        for rank, made in (one, other)
    )
    where = f"collective {at + 1} over {axis} of {shown_ranks(ranks)}"
    for (rank, made), (partner, longer) in ((other, one), (one, other)):
        rest = [call.form for call in made[at:]]
        if at < len(longer) and rest == [call.form for call in longer[at + 1 :]]:
            return f"rank {rank} skips {where}, which rank {partner} makes - {sides}"
    return f"ranks {one[0]} and {other[0]} disagree on {where} - {sides}"


_Exchange = tuple[list[Call], list[Call]]


def _by_pair(logs: Sequence[CallLog]) -> dict[tuple[int, ...], _Exchange]:
    """(sender, receiver) -> the sends and the receives, each in its rank's order."""
    pairs: dict[tuple[int, ...], _Exchange] = {}
    for log in logs:
        for call in log.calls:
            if call.op in MESSAGE_OPS:
                ends = pairs.setdefault(call.ranks, ([], []))
                ends[MESSAGE_OPS.index(call.op)].append(call)
    return pairs


def _compare_pair(
    sender: CallLog, receiver: CallLog, sends: list[Call], receives: list[Call]
) -> list[str]:
    source, target = sender.rank, receiver.rank
    for at, (sent, got) in enumerate(zip(sends, receives, strict=False)):
        if sent.form[1:] != got.form[1:]:
            return [
                f"message {at + 1} from rank {source} to rank {target} does not fit - "
                f"rank {source}, {sent.place}: {sent}; rank {target}, {got.place}: {got}"
            ]
    at = min(len(sends), len(receives))
    if len(sends) > at and not receiver.failed_at:
        return [f"rank {source} sends rank {target} a message that is never received - "
                f"{sends[at].place}: {sends[at]}"]  # fmt: skip
    if len(receives) > at and not sender.failed_at:
        return [f"rank {target} waits for a message that rank {source} never sends - "
                f"{receives[at].place}: {receives[at]}"]  # fmt: skip
    return []


_Meeting = tuple[bool, str, tuple[int, ...], int]
"""(whether it is a message, axis, ranks, its number there): the same for all who take part."""


def _stuck(logs: Sequence[CallLog]) -> list[str]:
    """Walk all call logs with calls that block until their partners have come; which ranks never end."""
    present = {log.rank for log in logs}
    calls = {t.rank: list(_batches(t.calls)) for t in logs}
    meetings = {rank: _meetings(batches) for rank, batches in calls.items()}
    missing: dict[_Meeting, int] = {}
    for rows in meetings.values():
        for row in rows:
            for meeting in row:
                missing[meeting] = len(present.intersection(meeting[2]))
    at = _walk(meetings, missing)
    waiting = {
        rank: next(
            call
            for call, meeting in zip(calls[rank][n], meetings[rank][n], strict=True)
            if missing[meeting]
        )
        for rank, n in at.items()
        if n < len(calls[rank])
    }
    if not waiting:
        return []
    shown = [
        f"rank {rank}, {call.place}: {call} over {call.axis} of {shown_ranks(call.ranks)}"
        for rank, call in sorted(waiting.items())[:8]
    ]
    more = f"; and {len(waiting) - 8} more ranks" if len(waiting) > 8 else ""
    return [f"deadlock: these calls wait for each other - {'; '.join(shown)}{more}"]


def _walk(
    meetings: Mapping[int, Sequence[Sequence[_Meeting]]], missing: dict[_Meeting, int]
) -> dict[int, int]:
    """How many batches each rank gets past; `missing` counts down who has not come."""
    at = dict.fromkeys(meetings, 0)
    come = dict.fromkeys(meetings, -1)
    sleeping: dict[_Meeting, list[int]] = defaultdict(list)
    awake = list(meetings)
    while awake:
        rank = awake.pop()
        rows = meetings[rank]
        while at[rank] < len(rows):
            row = rows[at[rank]]
            if come[rank] < at[rank]:
                come[rank] = at[rank]
                for meeting in row:
                    missing[meeting] -= 1
                    if not missing[meeting]:
                        awake.extend(sleeping.pop(meeting, ()))
            still = next((meeting for meeting in row if missing[meeting]), None)
            if still is not None:
                sleeping[still].append(rank)
                break
            at[rank] += 1
    return at


def _meetings(batches: Sequence[Sequence[Call]]) -> list[list[_Meeting]]:
    """For each call its meeting, numbered in the order of this rank."""
    numbers: Counter[tuple[bool, str, tuple[int, ...]]] = Counter()
    rows = []
    for batch in batches:
        row = []
        for call in batch:
            where = (call.op in MESSAGE_OPS, call.axis, call.ranks)
            numbers[where] += 1
            row.append((*where, numbers[where]))
        rows.append(row)
    return rows


def _batches(calls: Sequence[Call]) -> Iterator[list[Call]]:
    """Messages posted by one action together, collectives one by one."""
    batch: list[Call] = []
    for call in calls:
        together = (
            batch
            and call.op in MESSAGE_OPS
            and batch[-1].op in MESSAGE_OPS
            and call.place == batch[-1].place
        )
        if batch and not together:
            yield batch
            batch = []
        batch.append(call)
    if batch:
        yield batch


def shown_ranks(ranks: Sequence[int]) -> str:
    """Ranks 0, 8, ... 56; a run of neighbours as 0-7."""
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]}-{ranks[-1]}"
    if len(ranks) > 8:
        return f"ranks {', '.join(map(str, ranks[:6]))} ... {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
