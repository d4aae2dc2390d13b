"""Greedy blending by numpy: many stretches walked side by side, each verified and mended.

    guess the counts at the start of every stretch ─▶ walk all of them, a step of each at a time
    ─▶ a stretch that began elsewhere than the one before it ended is walked again from there until
       its counts meet those of the first walk: from then on both go the same way

A choice depends on the step and the counts alone, so what comes out is the one walk, to the bit,
whatever was guessed; a bad guess costs time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
_Int64 = npt.NDArray[np.int64]
Int16 = npt.NDArray[np.int16]

_BLOCK = 1 << 21  # samples whose stretches are walked together
TOGETHER = 1 << 16  # stretches times datasets of one numpy call: what a cache holds
_SHORTEST = 64  # steps of a stretch: shorter ones are mostly mending
FEW = 20  # so many datasets are compared one after the other, which argmax does slower
LOOK_EVERY = 8  # steps between two looks at whether walks have met
NOTHING_LEFT = -1
NEVER = 1 << 62  # a limit that is not reached


def blend(shares: Float64, limits: _Int64, size: int) -> tuple[Int16, _Int64]:
    """(dataset, sample) of every step; IndexError where no dataset has samples left."""
    dataset, sample = np.empty(size, np.int16), np.empty(size, np.int64)
    counts = np.zeros(len(shares), np.int64)
    limits = np.where(limits >= size, NEVER, np.maximum(limits, 0))
    for begin in range(0, size, _BLOCK):
        stop = min(begin + _BLOCK, size)
        chosen = _block(shares, limits, counts, begin, stop)
        if chosen.min() == NOTHING_LEFT:
            raise IndexError("no dataset has samples left")
        dataset[begin:stop] = chosen
        order = np.argsort(chosen, kind="stable")  # a dataset's samples are taken in order
        found = np.bincount(chosen, minlength=len(shares))
        first = np.repeat(counts - (np.cumsum(found) - found), found)
        sample[begin:stop][order] = first + np.arange(stop - begin)
        counts += found
    return dataset, sample


def _block(shares: Float64, limits: _Int64, counts: _Int64, begin: int, stop: int) -> Int16:
    """The choices of the steps from begin to stop; counts: what was taken before them."""
    steps = max(_SHORTEST, -(-(stop - begin) * len(shares) // TOGETHER))
    starts = np.arange(begin, stop, steps)
    before = guess(shares, limits, starts)
    before[0] = counts
    chosen = np.empty((steps, len(starts)), np.int16)  # of the last stretch too many
    walks = _Walks(shares, limits, before, starts)
    for step in range(steps):
        chosen[step] = walks.step()
    after = before + _counted(chosen, len(shares))
    while True:
        wrong = 1 + np.flatnonzero((before[1:] != after[:-1]).any(axis=1))
        if not len(wrong):
            in_order: Int16 = chosen.T.ravel()
            return in_order[: stop - begin]
        apart = after[wrong - 1] - before[wrong]
        before[wrong] = after[wrong - 1]
        after[wrong] += _mend(
            chosen, wrong, apart, _Walks(shares, limits, before[wrong], starts[wrong])
        )


def _mend(chosen: Int16, wrong: _Int64, apart: _Int64, walks: _Walks) -> _Int64:
    """Walk the wrong stretches again until each meets what was walked; returns how far it is not.

    apart: [stretch, dataset] how much more the walks have taken than the first walk had.
    """
    ends, number = np.zeros_like(apart), np.arange(len(wrong))
    for step in range(len(chosen)):
        now, then = walks.step(), chosen[step, wrong]
        changed = np.flatnonzero(now != then)
        for side, sign in ((now, 1), (then, -1)):
            taken = changed[side[changed] != NOTHING_LEFT]
            apart[taken, side[taken]] += sign
        chosen[step, wrong] = now
        if step % LOOK_EVERY == LOOK_EVERY - 1:
            going = np.count_nonzero(apart, axis=1) > 0
            if not going.any():
                return ends
            if not going.all():
                wrong, number, apart = wrong[going], number[going], apart[going]
                walks.keep(going)
    ends[number] = apart
    return ends


def guess(shares: Float64, limits: _Int64, steps: _Int64) -> _Int64:
    """[steps, datasets] counts that a walk may have before each step: nearly right, no more.

    Datasets are equally far behind their shares, those that are used up left out; rounded to whole
    samples, the largest remainders up.
    """
    position = steps[:, None].astype(np.float64)
    spent = np.broadcast_to(limits == 0, (len(steps), len(shares))).copy()
    for _ in shares:
        going = np.maximum((~spent).sum(axis=1, keepdims=True), 1)
        left = position - np.where(spent, limits, 0).sum(axis=1, keepdims=True)
        behind = (np.where(spent, 0, shares).sum(axis=1, keepdims=True) * position - left) / going
        due = shares * position - behind
        more = ~spent & (due >= limits)
        if not more.any():
            break
        spent |= more
    due = np.clip(np.where(spent, limits, due), 0, limits)
    counts = due.astype(np.int64)
    missing = steps - counts.sum(axis=1)
    rest = np.where(counts < limits, due - counts, -np.inf)
    rank = np.argsort(np.argsort(-rest, axis=1, kind="stable"), axis=1, kind="stable")
    counts += (rank < missing[:, None]) & (counts < limits)
    return counts


def _counted(chosen: Int16, datasets: int) -> _Int64:
    """[stretch, dataset] how often each was chosen."""
    stretches = chosen.shape[1]
    flat = np.arange(stretches) * (datasets + 1) + chosen + 1  # column 0: nothing was left
    found = np.bincount(flat.ravel(), minlength=stretches * (datasets + 1))
    return found.reshape(stretches, datasets + 1)[:, 1:]


class _Walks:
    """Where many walks stand; what is used up counts as infinitely often taken."""

    def __init__(self, shares: Float64, limits: _Int64, counts: _Int64, steps: _Int64) -> None:
        self._shares, self._limits = shares, limits
        self._bounded = np.flatnonzero(limits < NEVER)
        self._few = len(shares) <= FEW
        # one dataset of all walks lies together where datasets are gone through one by one
        self._taken = np.array(
            np.where(counts < limits, counts, np.inf), order="F" if self._few else "C"
        )
        self._position = steps.astype(np.float64)
        self._begin()

    def _begin(self) -> None:
        self._rows = np.arange(len(self._position))
        self._behind = np.empty_like(self._taken)
        self._best, self._further = np.empty_like(self._position), np.empty(len(self._rows), bool)

    def keep(self, which: npt.NDArray[np.bool_]) -> None:
        """Only these walks continue."""
        self._taken = np.array(self._taken[which], order="F" if self._few else "C")
        self._position = self._position[which]
        self._begin()

    def step(self) -> Int16:
        """The next choice of every walk: the dataset furthest behind, the lowest of equals."""
        position = np.maximum(self._position, 1.0)
        chosen = self._compare(position) if self._few else self._search(position)
        self._position += 1.0
        return chosen

    def _compare(self, position: Float64) -> Int16:
        taken, shares, best = self._taken, self._shares, self._best
        chosen = np.zeros(len(position), np.int16)
        np.multiply(position, shares[0], out=best)
        np.subtract(best, taken[:, 0], out=best)
        for dataset in range(1, len(shares)):
            behind = self._behind[:, dataset]
            np.multiply(position, shares[dataset], out=behind)
            np.subtract(behind, taken[:, dataset], out=behind)
            np.greater(behind, best, out=self._further)
            np.copyto(chosen, dataset, where=self._further)
            np.maximum(best, behind, out=best)
        if len(self._bounded):
            chosen[best == -np.inf] = NOTHING_LEFT
        for dataset in range(len(shares)):
            np.equal(chosen, dataset, out=self._further)
            np.add(taken[:, dataset], self._further, out=taken[:, dataset])
        for dataset in self._bounded.tolist():
            full = taken[:, dataset] >= self._limits[dataset]
            np.copyto(taken[:, dataset], np.inf, where=full)
        return chosen

    def _search(self, position: Float64) -> Int16:
        behind = np.multiply(self._shares, position[:, None], out=self._behind)
        behind -= self._taken
        chosen = behind.argmax(axis=1)
        taken = self._taken[self._rows, chosen] + 1.0
        if len(self._bounded):
            taken[taken >= self._limits[chosen]] = np.inf
        self._taken[self._rows, chosen] = taken
        if len(self._bounded):
            chosen[behind[self._rows, chosen] == -np.inf] = NOTHING_LEFT
        found: Int16 = chosen.astype(np.int16)
        return found
