"""Proves a lowered schedule sound whatever the real timing: complete, no deadlock, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megatron_lite.blueprint.schedules.actions import (
    MESSAGES,
    SENDS,
    Action,
    ActionGroup,
    Lowered,
    Op,
    ScheduleError,
)
from megatron_lite.blueprint.stages import Placement

_TWIN = {
    Op.SEND_F: (Op.RECV_F, 1),
    Op.RECV_F: (Op.SEND_F, -1),
    Op.SEND_B: (Op.RECV_B, -1),
    Op.RECV_B: (Op.SEND_B, 1),
}


def matching_end(action: Action) -> Action:
    """The other end of a message."""
    op, step = _TWIN[action.op]
    return Action(op, action.stage + step, action.microbatch)


def check_schedule(lowered: Lowered, placement: Placement, num_microbatches: int) -> None:
    """Raise ScheduleError unless the lists can be carried out by ranks that know nothing else.

    Each stage runs each micro batch forward once and backward once (B, or I and W) or never; each
    compute finds its input; the lists end even if every send blocks until its receive is posted;
    two ranks agree on the order of the messages between them; REDUCE arms the last backward.
    """
    _check_complete(lowered, placement, num_microbatches)
    _check_reductions(lowered)
    _check_inputs(lowered, len(placement) - 1)
    _check_progress(lowered)
    _check_order(lowered, placement)


def _actions(row: tuple[ActionGroup, ...]) -> Iterator[Action]:
    return (action for group in row for action in group)


def _check_complete(lowered: Lowered, placement: Placement, num_microbatches: int) -> None:
    seen: Counter[Action] = Counter()
    for rank, row in enumerate(lowered):
        for action in _actions(row):
            if placement[action.stage] != rank:
                raise ScheduleError(f"{action} is on rank {rank}, its stage is not")
            seen[action] += 1
    for action, times in seen.items():
        if times > 1:
            raise ScheduleError(f"{action} happens {times} times")
        if not 0 <= action.microbatch < num_microbatches:
            raise ScheduleError(f"{action}: there are {num_microbatches} micro batches")
    for stage in range(len(placement)):
        kinds = set()
        for m in range(num_microbatches):
            done = "".join(
                op.value for op in (Op.F, Op.B, Op.I, Op.W) if Action(op, stage, m) in seen
            )
            kinds.add("F+" if done in ("FB", "FIW") else done)
        if kinds not in ({"F"}, {"F+"}):
            raise ScheduleError(f"stage {stage} is not run once per micro batch: {sorted(kinds)}")


def _check_reductions(lowered: Lowered) -> None:
    for row in lowered:
        left: Counter[int] = Counter()
        armed: set[int] = set()
        for action in _actions(row):
            if action.op is Op.B or action.op is Op.W:
                left[action.stage] += 1
        for action in _actions(row):
            if action.op is Op.REDUCE:
                if left[action.stage] != 1 or action.stage in armed:
                    raise ScheduleError(f"{action} does not come just before the last backward")
                armed.add(action.stage)
            elif action.op is Op.B or action.op is Op.W:
                left[action.stage] -= 1
        if armed != set(left):
            raise ScheduleError(f"stages {sorted(set(left) - armed)} never reduce their gradients")


def _check_inputs(lowered: Lowered, last_stage: int) -> None:
    """Each compute finds what it needs on its own rank: received before, or made there."""
    for rank, row in enumerate(lowered):
        here: set[Action] = set()
        for action in _actions(row):
            for ways in _inputs(action, last_stage):
                if not any(way in here for way in ways):
                    raise ScheduleError(f"rank {rank} runs {action} before it has {ways[0]}")
            here.add(action)


def _inputs(action: Action, last_stage: int) -> tuple[tuple[Action, ...], ...]:
    """What must be there, each by one of several ways."""
    op, stage, m = action
    if op is Op.SEND_F:
        return ((Action(Op.F, stage, m),),)
    if op is Op.F:
        return ((Action(Op.RECV_F, stage, m), Action(Op.F, stage - 1, m)),) if stage else ()
    if op is Op.SEND_B:
        return ((Action(Op.B, stage, m), Action(Op.I, stage, m)),)
    if op is Op.W:
        return ((Action(Op.I, stage, m),),)
    if op is not Op.B and op is not Op.I:
        return ()
    own = (Action(Op.F, stage, m),)
    if stage == last_stage:
        return (own,)
    after = (Action(Op.RECV_B, stage, m), Action(Op.B, stage + 1, m), Action(Op.I, stage + 1, m))
    return own, after


def _check_progress(lowered: Lowered) -> None:
    """Walk all lists with sends and receives that block until the other end is posted."""
    batches = [[group for group in row if group[0].op in MESSAGES] for row in lowered]
    at = [0] * len(lowered)
    posted: set[Action] = set()
    sleeping: dict[Action, int] = {}
    awake = list(range(len(lowered)))
    while awake:
        rank = awake.pop()
        while at[rank] < len(batches[rank]):
            group = batches[rank][at[rank]]
            posted.update(group)
            awake.extend(sleeping.pop(action) for action in group if action in sleeping)
            missing = next((matching_end(a) for a in group if matching_end(a) not in posted), None)
            if missing is not None:
                sleeping[missing] = rank
                break
            at[rank] += 1
    if sleeping:
        stuck = {rank: str(action) for action, rank in sleeping.items()}
        raise ScheduleError(f"deadlock with blocking sends; each rank waits for {stuck}")


def _check_order(lowered: Lowered, placement: Placement) -> None:
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[Action]] = {}
    for rank, row in enumerate(lowered):
        for action in _actions(row):
            if action.op in SENDS:
                sent.setdefault((rank, placement[matching_end(action).stage]), []).append(action)
            elif action.op in MESSAGES:
                received.setdefault((placement[matching_end(action).stage], rank), []).append(
                    matching_end(action)
                )
    for pair in sent.keys() | received.keys():
        if sent.get(pair) != received.get(pair):
            raise ScheduleError(f"ranks {pair} disagree on the order of their messages")
