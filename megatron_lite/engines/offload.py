"""Masters and optimizer states in host memory, and their update there, a portion at a time.

    device    gradients ─▶ buffer                              buffer ─▶ weights
    host                   buffer ─▶ rule: master, states ─▶ buffer

While the host updates a portion the next one's gradients come, and the last one's weights go.  Only
the buffers travel, two each way, so only they are pinned.  On a CPU all is the same but for streams,
and a run trains to the same bits with its state here or beside the weights: a portion is rows, and
the rules are those of optim/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_lite.blueprint.buckets import HOST_PORTION
from megatron_lite.blueprint.figure.parts import Tensor as Spec
from megatron_lite.blueprint.optimizers import State, Treatment
from megatron_lite.blueprint.timeline import HOST_SPAN
from megatron_lite.config.errors import OutOfMemory
from megatron_lite.engines.held import Held, Stateful, fit_states
from megatron_lite.optim.groups import Groups, ParameterGroup, Rates
from megatron_lite.optim.shares import TpShare
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import ParameterPiece

WAITS = "--optimizer-cpu-offload (the host makes the update)"

_ALIGN = 16  # elements: every part begins on a cache line

Total = Callable[[Sequence[Tensor]], None]
"""See TpShares."""


@dataclass(slots=True, eq=False)
class _Part:
    """Rows of what is held: a member of an update, whose gradient lies in a buffer."""

    held: Held
    rows: slice
    start: int
    master: Tensor
    state: dict[str, Tensor]
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def spec(self) -> Spec:
        """Of the canonical tensor."""
        return self.held.spec

    @property
    def share(self) -> TpShare:
        """Of what is held: rules that ask for it are given whole tensors."""
        return self.held.share

    def within(self, buffer: Tensor) -> Tensor:
        """Its place in a buffer of its portion, in its shape."""
        return buffer[self.start : self.start + self.master.numel()].view(self.master.shape)


@dataclass(frozen=True, slots=True)
class _Portion:
    """Parts that are updated together; size: elements of a buffer."""

    group: ParameterGroup
    parts: Sequence[_Part]
    size: int


class _Lane:
    """Copies on a stream of their own; on a CPU they are made at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def follow(self) -> None:
        """Begin after what the device has been given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        """(target, source) pairs; what they are there after, None: now."""
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def join(self) -> None:
        """Let what the device is given from now on come after these copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _Turns:
    """Two buffers for each number format, used in turn, each with the copy that is in flight from or to it."""

    def __init__(self, memory: torch.device, *, pinned: bool) -> None:
        self._memory, self._pinned = memory, pinned
        self._buffers: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._flying: list[torch.cuda.Event | None] = [None, None]

    def reserve(self, formats: Iterable[torch.dtype], size: int) -> None:
        """Have room for portions of this size."""
        for dtype in set(formats):
            there = self._buffers.pop(dtype, None)
            if there is None or there[0].numel() < size:
                there = self._made(dtype, size), self._made(dtype, size)
            self._buffers[dtype] = there

    def _made(self, dtype: torch.dtype, size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self._memory, pin_memory=self._pinned)

    def buffer(self, turn: int, dtype: torch.dtype) -> Tensor:
        """Flat."""
        return self._buffers[dtype][turn % 2]

    def flies(self, turn: int, event: torch.cuda.Event | None) -> None:
        """A copy is on its way."""
        self._flying[turn % 2] = event

    def wait(self, turn: int) -> None:
        """Until its copy is there."""
        event = self._flying[turn % 2]
        if event is not None:
            event.synchronize()  # waits for the device


class HostUpdate:
    """What of the state lies in host memory; nothing where share is 0.

    share: of masters and states; groups: the run's rules; span: measures phases.
    """

    def __init__(
        self,
        ctx: ParallelContext,
        groups: Groups,
        *,
        share: float,
        span: Callable[[str], AbstractContextManager[object]],
    ) -> None:
        self.share, self._ctx, self._groups, self._span = share, ctx, groups, span
        kind = ctx.device.type
        # without memory the host has none either
        self._memory = ctx.device if kind == "meta" else torch.device("cpu")
        self._down, self._up = _Lane(ctx.device), _Lane(ctx.device)
        pinned = kind == "cuda"
        self._coming, self._going = (_Turns(self._memory, pinned=pinned) for _ in range(2))
        self._seen = self._taken = 0
        self._held: list[Held] = []
        self._portions: list[_Portion] = []
        self._steps = 0

    @property
    def waits_because(self) -> str:
        """Why the host must hear of a step before its update; "" where nothing is here."""
        return WAITS if self.share else ""

    def takes(self, piece: ParameterPiece) -> bool:
        """Whether master and state of it lie in host memory.

        Asked of one after the other: those it takes lie between those it leaves, by the share.
        """
        # of the whole tensor: tp ranks that have unequal parts of a vocabulary must find the same
        size = math.prod(piece.shape)
        self._seen += size
        takes = self._taken + size / 2 <= self.share * self._seen and self.share > 0.0
        self._taken += size * takes
        return takes

    @contextmanager
    def there(self, on_host: bool = True) -> Iterator[None]:
        """Within, what is made lies in host memory; raises OutOfMemory where there is none."""
        if not on_host:
            yield
            return
        try:
            with self._span(HOST_SPAN):
                yield
        except (MemoryError, RuntimeError) as error:
            if not _of_the_host(error):
                raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise OutOfMemory(
                "--optimizer-cpu-offload: the host gives no more memory for masters and optimizer state "
                f"({first[:200]}) - share them by --use-distributed-optimizer, lower "
                "--optimizer-offload-fraction, or drop it"
            ) from error

    def master(self, shape: Sequence[int]) -> Tensor:
        """Room for fp32 values."""
        with self.there():
            return torch.empty(shape, dtype=torch.float32, device=self._memory)

    def choose(self, held: Sequence[Held], steps: int) -> None:
        """Those that it updates, of which the update after so many steps changes some."""
        self._held, self._steps = list(held), steps

    def fit(self, owned: Iterable[Stateful]) -> None:
        """Have the states that this update needs, also those of matrices that are owned, and buffers."""
        with self.there(self.share > 0.0):
            fit_states(owned, self._groups, self._steps)
            fit_states(self._held, self._groups, self._steps)
            self._portions = list(self._cut())
            largest = max((portion.size for portion in self._portions), default=0)
            for turns, formats in (
                (self._coming, {held.accumulator.dtype for held in self._held}),
                (self._going, {held.weight.dtype for held in self._held}),
            ):
                turns.reserve(formats, largest)

    def begin(self) -> None:
        """Start the copy of the first gradients; they are what the device was asked to make of them."""
        if self._held:
            self._down.follow()
            self._up.follow()
            self._fetch(0)

    def finish(self, rates: Rates, *, steps: int, total: Total) -> None:
        """The update after so many, weights included.  Collective over tp where a rule sums over it."""
        if not self._held:
            return
        with self.there():
            for turn, portion in enumerate(self._portions):
                self._fetch(turn + 1)
                self._coming.wait(turn)
                self._groups.update(
                    {portion.group: portion.parts}, rates, steps=steps, total=self._from_here(total)
                )
                self._send(turn, portion)
        self._up.join()

    def _fetch(self, turn: int) -> None:
        """Start the copy of a portion's gradients, if there is one."""
        if turn >= len(self._portions):
            return
        pairs = []
        for part in self._portions[turn].parts:
            source = part.held.gradient[part.rows]
            part.gradient = part.within(self._coming.buffer(turn, source.dtype))
            pairs.append((part.gradient, source))
        self._coming.flies(turn, self._down.copy(pairs))

    def _send(self, turn: int, portion: _Portion) -> None:
        """Round a portion's masters, and start their copy to the weights."""
        self._going.wait(turn)
        pairs = []
        for part in portion.parts:
            weight = part.held.weight[part.rows]
            rounded = part.within(self._going.buffer(turn, weight.dtype))
            pairs.append((weight, rounded))
        torch._foreach_copy_([rounded for _, rounded in pairs], [p.master for p in portion.parts])
        self._going.flies(turn, self._up.copy(pairs))

    def _from_here(self, total: Total) -> Total:
        """Sums over ranks of what lies in host memory: their devices do it."""

        def summed(tensors: Sequence[Tensor]) -> None:
            there = [tensor.to(self._ctx.device) for tensor in tensors]
            total(there)
            for tensor, whole in zip(tensors, there, strict=True):
                tensor.copy_(whole)

        return summed

    def _cut(self) -> Iterator[_Portion]:
        """All that trains, cut into rows where its rule allows it, and put together by group."""
        for group, members in self._groups.trained(self._held, self._steps).items():
            parts: list[_Part] = []
            size = 0
            for held in members:
                how = self._groups.treatment(held.spec)
                # tp ranks with other parts of a tensor must meet in the same portion
                apart = how.sums_over_tp is not None
                for rows in _rows(held, how):
                    width = _padded(held.master[rows].numel())
                    if parts and (apart or size + width > HOST_PORTION):
                        yield _Portion(group, parts, size)
                        parts, size = [], 0
                    parts.append(_part(held, how, rows, size))
                    size += width
            if parts:
                yield _Portion(group, parts, size)


_NO_ROOM = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")


def _of_the_host(error: Exception) -> bool:
    """Whether the host's memory was too small, pinned or not; a device's lack has a class of its own."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _NO_ROOM)


def _rows(held: Held, how: Treatment) -> Iterator[slice]:
    """Of what is held, so many at a time; all of what its rule must see whole."""
    length, size = held.master.shape[0], held.master.numel()
    in_blocks = len(held.master.shape) == 1 and any(state.block > 1 for state in how.states)
    if size <= HOST_PORTION or how.needs(0) or in_blocks:
        yield slice(0, length)
        return
    at_once = max(1, HOST_PORTION * length // size)
    for first in range(0, length, at_once):
        yield slice(first, min(first + at_once, length))


def _part(held: Held, how: Treatment, rows: slice, start: int) -> _Part:
    states = {
        state.name: _rows_of(held.state[state.name], state, rows, held.master.shape[0])
        for state in how.states
    }
    return _Part(held, rows, start, held.master[rows], states)


def _rows_of(data: Tensor, state: State, rows: slice, length: int) -> Tensor:
    """What of a state belongs to these rows of so many."""
    if rows == slice(0, length):
        return data
    dim = 0 if state.dims is None else state.dims.index(0)
    return data.narrow(dim, rows.start, rows.stop - rows.start)


def _padded(count: int) -> int:
    return math.ceil(count / _ALIGN) * _ALIGN
