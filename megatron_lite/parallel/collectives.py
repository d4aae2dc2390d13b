"""all_reduce, all_gather and reduce_scatter over an Axis; a size-1 axis returns its input.

Every rank of the axis must make the same call with the same shape and dtype; the shapes in the
docstrings are one rank's, n is the axis' size.  A lost rank or a timeout is torch's RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.parallel.context import Axis
from megatron_lite.parallel.waits import NOT_MEASURED, Waits

# torch >= 2.13 renames these two and warns about the old names
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SUM, MAX, MIN = dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN


_REDUCTIONS = {SUM: "sum", MAX: "max", MIN: "min"}


def reduction_name(op: Any) -> str:
    """sum, max or min; torch's own words for others."""
    return next((name for known, name in _REDUCTIONS.items() if op == known), str(op))


def _announce(axis: Axis, call: str, whole: Tensor, what: str = "") -> None:
    if axis.witness is not None:
        axis.witness.collective(call, axis.name, axis.ranks, whole, what)


class Pending:
    """A collective under way; wait() returns its result."""

    def __init__(
        self,
        result: Tensor,
        work: Any = None,
        dim: int = 0,
        keep: Tensor | None = None,
        waited: Callable[[], None] | None = None,
        waits: Waits = NOT_MEASURED,
    ):
        self._result, self._work, self._dim, self._keep = result, work, dim, keep
        self._waited, self._waits = waited, waits

    def wait(self) -> Tensor:
        """The finished tensor; on a GPU only the stream waits."""
        if self._work is not None:
            with self._waits:
                self._work.wait()
            self._work = self._keep = None
            if self._waited is not None:
                self._waited()
        return self._result if self._dim == 0 else _to_dim(self._result, self._dim)


def _to_dim(stacked: Tensor, dim: int) -> Tensor:
    """[ranks, ...] -> the ranks' pieces side by side along dim."""
    return torch.cat(tuple(stacked), dim=dim)


def all_reduce(x: Tensor, axis: Axis, op: Any = SUM) -> Tensor:
    """x: [...] -> the same, combined over the axis by op, in place."""
    if axis.watch is not None:
        return start_all_reduce(x, axis, op).wait()
    if axis.size > 1:
        _announce(axis, "all-reduce", x, reduction_name(op))
        with axis.waits:
            dist.all_reduce(x, op=op, group=axis.group)
    return x


def start_all_reduce(x: Tensor, axis: Axis, op: Any = SUM) -> Pending:
    """Begin combining x [...] over the axis by op, in place; x may not be touched before wait()."""
    if axis.size == 1:
        return Pending(x)
    _announce(axis, "all-reduce", x, reduction_name(op))
    work = dist.all_reduce(x, op=op, group=axis.group, async_op=True)
    return Pending(x, work, waited=_told(axis, "all-reduce", x, work), waits=axis.waits)


def start_all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Pending:
    """Begin putting the ranks' x side by side along dim: [k, ...] -> [n k, ...] for dim 0.

    Any other dim costs a copy in wait().
    """
    if axis.size == 1:
        return Pending(x)
    x = x.contiguous()
    shape = (axis.size * x.shape[0], *x.shape[1:])
    out = x.new_empty(shape)
    _announce(axis, "all-gather", out)
    work = _gather_into(out, x, group=axis.group, async_op=True)
    told = _told(axis, "all-gather", x, work)
    if dim:
        out = out.view(axis.size, *x.shape)
    return Pending(out, work, dim, x, told, axis.waits)


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """x: [k, ...] -> [n k, ...] for dim 0: the ranks' x side by side along dim."""
    return start_all_gather(x, axis, dim).wait()


def start_reduce_scatter(x: Tensor, axis: Axis) -> Pending:
    """Begin summing x [n k, ...] over the axis; wait() gives this rank's slice [k, ...] of dim 0."""
    if axis.size == 1:
        return Pending(x)
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    _announce(axis, "reduce-scatter", x, "sum")
    work = _scatter_into(out, x, group=axis.group, async_op=True)
    told = _told(axis, "reduce-scatter", x, work)
    return Pending(out, work, keep=x, waited=told, waits=axis.waits)


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """x: [n k, ...] -> [k, ...]: the sum over the axis, this rank's slice of dim 0."""
    return start_reduce_scatter(x, axis).wait()


def _told(axis: Axis, what: str, x: Tensor, work: Any) -> Callable[[], None] | None:
    return None if axis.watch is None else axis.watch(axis.name, what, x.nbytes, work)


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
        _announce(axis, "barrier", torch.empty(0))
        with axis.waits:
            dist.barrier(group=axis.group)


def gather_text(text: str, axis: Axis, device: torch.device) -> list[str]:
    """Every rank's text on the axis' first rank, in order; empty elsewhere.  One after the other."""
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    if axis.rank:
        for part in (torch.tensor([len(mine)]), mine):
            dist.send(part.to(device), axis.ranks[0], group=axis.group)
        return []
    texts = [text]
    for rank in axis.ranks[1:]:
        size = torch.zeros(1, dtype=torch.int64, device=device)
        dist.recv(size, rank, group=axis.group)
        theirs = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
        dist.recv(theirs, rank, group=axis.group)
        texts.append(theirs.cpu().numpy().tobytes().decode())
    return texts
