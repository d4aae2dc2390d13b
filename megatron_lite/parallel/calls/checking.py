"""--check-collectives: before each call the ranks compare it through the store.

    each member  ── its call ──▶  store  ◀── reads all: the group's first rank
                 ◀── verdict: proceed, or what does not fit, with every rank's call and line

A mismatch otherwise hangs until the timeout, or sums the wrong numbers.  Each call then waits for
its partners, so it costs one round trip to the store: for finding a fault, not for training.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]

from megatron_lite.blueprint.schedules.actions import Action
from megatron_lite.config.errors import DistributedError
from megatron_lite.parallel.calls.log import Call, CallLog, shown_ranks
from megatron_lite.parallel.calls.recorder import CallRecorder

_GO = "go"


class Checker(CallRecorder):
    """Compares each call of this rank with those of its partners, before it is made.

    pp: this rank's place in the pipeline: ranks of one place must call from the same line.
    seconds: how long a partner may take to come.
    """

    def __init__(
        self, store: Store, *, rank: int, pp: int, step: Callable[[], int], seconds: float
    ) -> None:
        super().__init__(CallLog(rank, pp=pp))
        self._store, self._step, self._seconds = store, step, seconds
        self._numbers: Counter[tuple[str, tuple[int, ...], str]] = Counter()
        self._expected: dict[str, tuple[str, Call]] = {}

    def reached(self, position: int, group: Sequence[Action]) -> None:
        """As CallRecorder does, named by the current iteration."""
        self.part = f"iteration {self._step() + 1}"
        super().reached(position, group)

    def take(self, call: Call) -> None:
        """Raise DistributedError on every member alike unless all make the same call next."""
        number = self._next(call)
        name = f"{call.axis}/{'-'.join(map(str, call.ranks))}/{number}"
        mine = _written(call, self.log.pp)
        self._store.set(f"at/{self.log.rank}", mine)
        if call.op == "send":
            self._store.set(name, mine)
        elif call.op == "receive":
            self._expected[call.what] = (name, call)
        else:
            self._meet(name, call, number, mine)

    def _next(self, call: Call) -> int:
        kind = "message" if call.op in ("send", "receive") else "collective"
        key = (call.axis, call.ranks, kind)
        self._numbers[key] += 1
        return self._numbers[key]

    def _meet(self, name: str, call: Call, number: int, mine: str) -> None:
        me, first = self.log.rank, call.ranks[0]
        self._store.set(f"{name}/{me}", mine)
        if me == first:
            self._store.set(f"{name}/verdict", self._judge(name, call, number) or _GO)
        verdict = self._wait(f"{name}/verdict", self._seconds + 30.0)
        if verdict is None:
            raise DistributedError(
                f"--check-collectives: rank {first} did not come to collective {number} over "
                f"{call.axis} of {shown_ranks(call.ranks)}, {call.place}: {call}; {self._whereabouts(first)}"
            )
        if verdict != _GO:
            raise DistributedError(verdict)
        # every rank has read the verdict before this one
        self._forget(f"{name.rpartition('/')[0]}/{number - 1}", first_too=me == first)

    def _judge(self, name: str, call: Call, number: int) -> str | None:
        """What does not fit, seen by the first rank of the group; None if all do."""
        end = time.monotonic() + self._seconds
        model = json.loads(_written(call, self.log.pp))
        where = f"--check-collectives: collective {number} over {call.axis} of {shown_ranks(call.ranks)}"
        for rank in call.ranks[1:]:
            said = self._wait(f"{name}/{rank}", max(end - time.monotonic(), 0.1))
            if said is None:
                return (
                    f"{where}: rank {rank} did not come within {self._seconds:g} s - rank "
                    f"{call.ranks[0]}, {call.place}: {call}; {self._whereabouts(rank)}"
                )
            theirs = json.loads(said)
            if not _fit(model, theirs):
                return (
                    f"{where} does not fit - rank {call.ranks[0]}, {model['place']}: {model['text']}; "
                    f"rank {rank}, {theirs['place']}: {theirs['text']}"
                )
        return None

    def waiting(self, what: str = "") -> AbstractContextManager[object]:
        """Wait until the message has been sent; raise DistributedError where it is another one."""
        if what:
            self._arrives(what)
        return super().waiting()

    def _arrives(self, what: str) -> None:
        found = self._expected.pop(what, None)
        if found is None:
            return
        name, call = found
        source, me = call.ranks
        said = self._wait(name, self._seconds)
        if said is None:
            raise DistributedError(
                f"--check-collectives: rank {source} does not send what rank {me} waits for, "
                f"{call.place}: {call}; {self._whereabouts(source)}"
            )
        theirs = json.loads(said)
        if theirs["form"][1:] != json.loads(_written(call, self.log.pp))["form"][1:]:
            raise DistributedError(
                f"--check-collectives: a message from rank {source} to rank {me} does not fit - "
                f"rank {source}, {theirs['place']}: {theirs['text']}; rank {me}, {call.place}: {call}"
            )
        self._store.delete_key(name)

    def _wait(self, name: str, seconds: float) -> str | None:
        try:
            self._store.wait([name], timedelta(seconds=seconds))
        except RuntimeError:  # torch's DistStoreError: not there in time
            return None
        return bytes(self._store.get(name)).decode()

    def _whereabouts(self, rank: int) -> str:
        said = self._wait(f"at/{rank}", 0.1)
        if said is None:
            return f"rank {rank} has made no call at all"
        seen = json.loads(said)
        return f"rank {rank} was last at {seen['axis']}, {seen['place']}: {seen['text']}"

    def _forget(self, name: str, *, first_too: bool) -> None:
        self._store.delete_key(f"{name}/{self.log.rank}")
        if first_too:
            self._store.delete_key(f"{name}/verdict")


def _written(call: Call, pp: int) -> str:
    return json.dumps(
        {"form": call.form, "place": call.place, "line": call.line, "axis": call.axis, "pp": pp,
         "text": str(call)}
    )  # fmt: skip


def _fit(one: dict[str, object], other: dict[str, object]) -> bool:
    same_list = one["pp"] == other["pp"]
    names = ("form", "place", "line") if same_list else ("form",)
    return all(one[name] == other[name] for name in names)
