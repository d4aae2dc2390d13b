"""all_reduce, all_gather, reduce_scatter, exchanges with owners over an Axis; one of size 1 returns its input.

Every rank of the axis must make the same call with the same shape and dtype; the shapes in the
docstrings are one rank's, n is the axis' size.  A lost rank or a timeout is torch's RuntimeError.

What is waited for at once is called without async_op: on a GPU it then runs on the stream that
computes, without events between two streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.parallel.context import Axis
from megatron_lite.parallel.observer import NOBODY, Observer, Request

# torch >= 2.13 renames these two and warns about the old names
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SUM, MAX, MIN = dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN


_REDUCTIONS = {SUM: "sum", MAX: "max", MIN: "min"}


def _asked(axis: Axis, op: str, whole: Tensor, what: str = "") -> Request:
    """The next call on the axis; its observer has seen it."""
    request = Request(op, axis.name, axis.ranks, whole, what)
    axis.observer.before(request)
    return request


class Pending:
    """A collective in flight; wait() returns its result."""

    def __init__(
        self,
        result: Tensor,
        work: Any = None,
        dim: int = 0,
        keep: Tensor | None = None,
        observer: Observer = NOBODY,
        ended: Callable[[], None] | None = None,
    ):
        self._result, self._work, self._dim, self._keep = result, work, dim, keep
        self._observer, self._ended = observer, ended

    def wait(self) -> Tensor:
        """The finished tensor; on a GPU only the stream waits."""
        if self._work is not None:
            with self._observer.waiting():
                self._work.wait()
            self._work = self._keep = None
            if self._ended is not None:
                self._ended()
        return self._result if self._dim == 0 else _to_dim(self._result, self._dim)


def _to_dim(stacked: Tensor, dim: int) -> Tensor:
    """[ranks, ...] -> the ranks' pieces side by side along dim."""
    return torch.cat(tuple(stacked), dim=dim)


def all_reduce(x: Tensor, axis: Axis, op: Any = SUM) -> Tensor:
    """x: [...] -> the same, combined over the axis by op, in place."""
    if axis.observer.follows:
        return start_all_reduce(x, axis, op).wait()
    if axis.size > 1:
        _asked(axis, "all-reduce", x, _REDUCTIONS[op])
        with axis.observer.waiting():
            dist.all_reduce(x, op=op, group=axis.group)
    return x


def start_all_reduce(x: Tensor, axis: Axis, op: Any = SUM) -> Pending:
    """Begin combining x [...] over the axis by op, in place; x may not be touched before wait()."""
    if axis.size == 1:
        return Pending(x)
    request = _asked(axis, "all-reduce", x, _REDUCTIONS[op])
    work = dist.all_reduce(x, op=op, group=axis.group, async_op=True)
    return _pending(axis, request, x, work)


def start_all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Pending:
    """Begin putting the ranks' x side by side along dim: [k, ...] -> [n k, ...] for dim 0.

    Any other dim costs a copy in wait().
    """
    if axis.size == 1:
        return Pending(x)
    x = x.contiguous()
    shape = (axis.size * x.shape[0], *x.shape[1:])
    out = x.new_empty(shape)
    request = _asked(axis, "all-gather", out)
    work = _gather_into(out, x, group=axis.group, async_op=True)
    if dim:
        out = out.view(axis.size, *x.shape)
    return _pending(axis, request, out, work, keep=x, dim=dim)


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """x: [k, ...] -> [n k, ...] for dim 0: the ranks' x side by side along dim."""
    if axis.size == 1 or axis.observer.follows:
        return start_all_gather(x, axis, dim).wait()
    x = x.contiguous()
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    _asked(axis, "all-gather", out)
    with axis.observer.waiting():
        _gather_into(out, x, group=axis.group)
    return _to_dim(out.view(axis.size, *x.shape), dim) if dim else out


def start_reduce_scatter(x: Tensor, axis: Axis) -> Pending:
    """Begin summing x [n k, ...] over the axis; wait() gives this rank's slice [k, ...] of dim 0."""
    if axis.size == 1:
        return Pending(x)
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    request = _asked(axis, "reduce-scatter", x, "sum")
    work = _scatter_into(out, x, group=axis.group, async_op=True)
    return _pending(axis, request, out, work, keep=x)


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """x: [n k, ...] -> [k, ...]: the sum over the axis, this rank's slice of dim 0."""
    if axis.size == 1 or axis.observer.follows:
        return start_reduce_scatter(x, axis).wait()
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    _asked(axis, "reduce-scatter", x, "sum")
    with axis.observer.waiting():
        _scatter_into(out, x, group=axis.group)
    return out


def gather_to_owners(x: Tensor, axis: Axis, sizes: Sequence[int]) -> Tensor:
    """x: [sum of sizes] -> [n sizes[rank]]: rank k gets the k-th part of every rank's x, in their order."""
    if axis.size == 1:
        return x
    own = sizes[axis.rank]
    out = x.new_empty(axis.size * own)
    return _exchange(out, x, axis, [own] * axis.size, list(sizes), whole=x)


def spread_from_owners(x: Tensor, axis: Axis, sizes: Sequence[int]) -> Tensor:
    """x: [n sizes[rank]] -> [sum of sizes]: each rank's x has a part for every rank; the way back."""
    if axis.size == 1:
        return x
    out = x.new_empty(sum(sizes))
    return _exchange(out, x, axis, list(sizes), [sizes[axis.rank]] * axis.size, whole=out)


def _exchange(
    out: Tensor, x: Tensor, axis: Axis, received: list[int], sent: list[int], *, whole: Tensor
) -> Tensor:
    """whole: the one of both that is as long on every rank."""
    request = _asked(axis, "all-to-all", whole)
    work = dist.all_to_all_single(out, x, received, sent, group=axis.group, async_op=True)
    return _pending(axis, request, out, work, keep=x).wait()


def _pending(
    axis: Axis,
    request: Request,
    result: Tensor,
    work: Any,
    keep: Tensor | None = None,
    dim: int = 0,
) -> Pending:
    ended = axis.observer.started(request, work)
    return Pending(result, work, dim, keep, axis.observer, ended)


def local_slice(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """x: [n k, ...] -> [k, ...] for dim 0: this rank's slice along dim, a view; no communication."""
    if axis.size == 1:
        return x
    assert x.shape[dim] % axis.size == 0, f"{tuple(x.shape)} cut along {dim} over {axis.size}"
    size = x.shape[dim] // axis.size
    return x.narrow(dim, axis.rank * size, size)


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis is here."""
    if axis.size > 1:
        _asked(axis, "barrier", torch.empty(0))
        with axis.observer.waiting():
            dist.barrier(group=axis.group)


def gather_text(text: str, axis: Axis, device: torch.device) -> list[str]:
    """Every rank's text on the axis' first rank, in order; empty elsewhere.  One after the other."""
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    if axis.rank:
        _send(torch.tensor([len(mine)]).to(device), axis, f"length of rank {axis.rank}'s text")
        _send(mine.to(device), axis, f"text of rank {axis.rank}")
        return []
    texts = [text]
    for rank in range(1, axis.size):
        size = torch.zeros(1, dtype=torch.int64, device=device)
        _receive(size, axis, rank, f"length of rank {rank}'s text")
        theirs = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
        _receive(theirs, axis, rank, f"text of rank {rank}")
        texts.append(theirs.cpu().numpy().tobytes().decode())
    return texts


def _send(x: Tensor, axis: Axis, what: str) -> None:
    """x to the axis' first rank."""
    ends = (axis.ranks[axis.rank], axis.ranks[0])
    axis.observer.before(Request("send", axis.name, ends, x, what))
    with axis.observer.waiting():
        dist.send(x, axis.ranks[0], group=axis.group)


def _receive(x: Tensor, axis: Axis, rank: int, what: str) -> None:
    """Into x, from a rank of the axis, on its first."""
    ends = (axis.ranks[rank], axis.ranks[0])
    axis.observer.before(Request("receive", axis.name, ends, x, what))
    with axis.observer.waiting(what):
        dist.recv(x, axis.ranks[rank], group=axis.group)
