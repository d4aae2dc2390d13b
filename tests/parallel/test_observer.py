"""What an observer is told: each call once, before it is made, by all axes, in the order of the observers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megatron_lite.blueprint.schedules.actions import Action
from megatron_lite.config.errors import DistributedError
from megatron_lite.parallel import collectives as c
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.observer import NOBODY, Observer, Request
from megatron_lite.pipeline.mail import Mail
from megatron_lite.rehearsal.process_group import SilentGroup, simulated_rank
from tests.support.axes import PP
from tests.support.tiny import draw, tiny_config

CPU = torch.device("cpu")


class Diary(Observer):
    """Everything it is told, in order."""

    def __init__(self, name: str, diary: list[tuple[str, ...]], *, follows: bool = False) -> None:
        self.name, self.diary, self.follows = name, diary, follows

    def before(self, request: Request) -> None:
        self.diary.append((self.name, "before", request.op, request.axis, request.what))

    def started(self, request: Request, work: Any) -> Callable[[], None] | None:
        self.diary.append((self.name, "started", request.op))
        return lambda: self.diary.append((self.name, "ended", request.op))

    @contextmanager
    def waiting(self, what: str = "") -> Iterator[None]:
        self.diary.append((self.name, "waits", what))
        yield
        self.diary.append((self.name, "waited", what))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often torch's group was asked for what."""
    counted: Counter[str] = Counter()

    def count(name: str) -> Any:
        whole = getattr(SilentGroup, name)

        def counting(*arguments: Any, **keywords: Any) -> Any:
            counted[name] += 1
            return whole(*arguments, **keywords)

        return counting

    for name in ("allreduce", "all_gather_single", "_allgather_base", "reduce_scatter_single",
                 "_reduce_scatter_base", "barrier", "send", "recv"):  # fmt: skip
        monkeypatch.setattr(SilentGroup, name, count(name))
    return counted


@contextmanager
def rank_0_of_two(*observers: Observer, **changes: Any) -> Iterator[ParallelContext]:
    with simulated_rank(0, 2):
        grid = draw(tiny_config(**changes), 2).grid
        yield ParallelContext.from_grid(grid, 0, CPU).observed(*observers)


def test_every_call_is_told_once_before_it_is_made(made: Counter[str]) -> None:
    diary: list[tuple[str, ...]] = []
    with rank_0_of_two(Diary("a", diary)) as ctx:
        c.all_reduce(torch.ones(4), ctx.dp, c.MAX)
        c.all_gather(torch.ones(4), ctx.world, dim=0)
        c.reduce_scatter(torch.ones(4), ctx.dp)
        c.barrier(ctx.world)
        c.gather_text("mine", ctx.world, CPU)
        c.all_reduce(torch.ones(4), ctx.tp)  # alone on it: asks nobody
    told = [entry[2:] for entry in diary if entry[1] == "before"]
    assert told == [
        ("all-reduce", "dp", "max"), ("all-gather", "world", ""), ("reduce-scatter", "dp", "sum"),
        ("barrier", "world", ""), ("receive", "world", "length of rank 1's text"),
        ("receive", "world", "text of rank 1"),
    ]  # fmt: skip
    assert sum(made.values()) == len(told)
    waits = [entry[2] for entry in diary if entry[1] == "waits"]
    assert waits == ["", "", "", "", "length of rank 1's text", "text of rank 1"]


def test_messages_are_told_with_their_names_and_ends(made: Counter[str]) -> None:
    seen: list[Request] = []

    class Ends(Observer):
        def before(self, request: Request) -> None:
            seen.append(request)

    diary: list[tuple[str, ...]] = []
    with rank_0_of_two(Ends(), Diary("a", diary), **{PP: 2}) as ctx:
        mail = Mail(ctx.pp, placement=(0, 1), shape=(2, 1, 4))
        mail.put(torch.ones(2, 1, 4), forward=True, stage=1, microbatch=3)
        mail.post((Action.parse("0SEND_F3"), Action.parse("0RECV_B3")))
        mail.take(forward=False, stage=0, microbatch=3)
        mail.finish()
    assert [(r.op, r.ranks, r.what) for r in seen] == [
        ("send", (0, 1), "activation into stage 1, micro batch 3"),
        ("receive", (1, 0), "gradient into stage 0, micro batch 3"),
    ]
    assert made == {"send": 1, "recv": 1}
    assert ("a", "waits", "gradient into stage 0, micro batch 3") in diary


def test_several_are_told_in_order_and_one_that_follows_sees_the_end() -> None:
    diary: list[tuple[str, ...]] = []
    with rank_0_of_two(Diary("a", diary), Diary("b", diary, follows=True)) as ctx:
        c.all_reduce(torch.ones(4), ctx.dp)
    assert [entry[:2] for entry in diary] == [
        ("a", "before"), ("b", "before"), ("a", "started"), ("b", "started"), ("a", "waits"),
        ("b", "waits"), ("b", "waited"), ("a", "waited"), ("a", "ended"), ("b", "ended"),
    ]  # fmt: skip


def test_a_call_that_an_observer_refuses_is_not_made(made: Counter[str]) -> None:
    class Refuses(Observer):
        def before(self, request: Request) -> None:
            raise DistributedError("no")

    with rank_0_of_two(Refuses()) as ctx, pytest.raises(DistributedError):
        c.all_gather(torch.ones(4), ctx.dp)
    assert made == {}


def test_nobody_looks_unless_asked() -> None:
    assert ParallelContext.serial().dp.observer is NOBODY
    assert ParallelContext.serial().observed().world.observer is NOBODY
    request = Request("all-gather", "dp", (0, 1), torch.ones(4))
    assert request.own_bytes == 8 and request._replace(op="all-reduce").own_bytes == 16
