"""ZB-H1 and ZB-V (arXiv:2401.10241): the backward is split into dgrad and wgrad, and wgrads fill the bubble.

I (dgrad) computes the gradient of the input, which the previous stage waits for; W (wgrad) those of
the weights, which no other stage needs, so that they can fill the bubble.
"""

from __future__ import annotations

from collections import Counter

from megatron_lite.blueprint.schedules.actions import Action, Op, Schedule, ScheduleError
from megatron_lite.blueprint.schedules.one_f_one_b import one_f_one_b
from megatron_lite.blueprint.stages import Placement, folded


def zb_h1(placement: Placement, num_microbatches: int) -> Schedule:
    """1F1B's order with I for B; rank r keeps r wgrads in hand for the drain.

    A third of 1F1B's bubble where F, I and W take equally long: (pp - 1)(F + I - W) in all.  Every
    rank keeps pp micro batches, as many as 1F1B's first.  placement: one stage per rank, in order.
    """
    lists = []
    for rank, row in enumerate(one_f_one_b(placement, num_microbatches).lists):
        actions: list[Action] = []
        done = 0
        for op, stage, m in row:
            if op is Op.F:
                actions.append(Action(op, stage, m))
                continue
            actions.append(Action(Op.I, stage, m))
            if m >= rank:
                actions.append(Action(Op.W, stage, done))
                done += 1
        rest = (Action(Op.W, rank, m) for m in range(done, num_microbatches))
        lists.append((*actions, *rest))
    return Schedule(tuple(lists), placement)


_LETTERS = {
    "f": (0, Op.F), "i": (0, Op.I), "w": (0, Op.W),
    "F": (1, Op.F), "I": (1, Op.I), "W": (1, Op.W),
}  # fmt: skip
"""How zb_v writes a rank's work: small letters for the way down the V, capitals for the way up."""


def zb_v(placement: Placement, num_microbatches: int) -> Schedule:
    """Two chunks per rank folded to a V, so that the last stage sits on the first rank.

    Where F, I and W take equally long a rank never waits once it has begun: what is left is that
    rank r begins r chunk times late, a sixth of 1F1B's bubble.  Every rank keeps 2 pp chunk
    activations, 1F1B's first rank 2 pp halves of a stage: the same memory, evenly spread.
    placement: stage s < pp on rank s, and back again.
    """
    pp = max(placement) + 1
    if placement != folded(pp):
        raise ScheduleError(f"zb-v has two chunks per rank, there and back, not {placement}")
    lists = []
    for rank in range(pp):
        stages = (rank, 2 * pp - 1 - rank)
        counted: Counter[str] = Counter()
        actions = []
        for letter in _v_letters(pp, rank, num_microbatches):
            chunk, op = _LETTERS[letter]
            m = counted[letter]
            counted[letter] += 1
            if m < num_microbatches:
                actions.append(Action(op, stages[chunk], m))
        lists.append(tuple(actions))
    return Schedule(tuple(lists), placement)


def _v_letters(pp: int, rank: int, num_microbatches: int) -> str:
    """A rank's work for at least 2 pp - 1 micro batches, fewer never fill the V; surplus is cut."""
    m = max(num_microbatches, 2 * pp - 1)
    first = 2 * (pp - rank) - 1  # until the first micro batch has come back on the way up
    down = m - first - rank  # forwards left for the steady phase
    head = "f" * first + "Ff" * rank + "FIW" * (pp - rank)
    steady = "fiwFIW" * down + "iwFIW" * (pp - 1 - rank)
    drain = "iI" * rank + "iw" * (pp - rank) + "W" * rank + "w" * rank
    return head + steady + drain
