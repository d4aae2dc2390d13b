"""Prefill and decode: continuing token sequences of any lengths, several at once.

    waiting requests ─▶ a free row ─▶ the prompt in chunks ─▶ a token at a time ─▶ the row is free

A row that ends makes place for the next request while the others continue.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megatron_lite.config.errors import ConfigError, NumericsError
from megatron_lite.config.sections.model import BY_LENGTH
from megatron_lite.inference.replay import recorder
from megatron_lite.inference.stages import CachedRows
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.collectives import all_reduce

Pick = Callable[[Tensor, Sequence[int]], Tensor]
"""(logits fp32 [1, v], the text's tokens so far) -> its next one, int64 [1]."""

End = Literal["eod", "stop", "length", "positions"]
"""Why nothing follows: the end-of-document token, the caller, the tokens asked for, the model's positions."""

_LARGEST = torch.finfo(torch.float32).max
_NOT_FINITE = -1
"""In the place of a token where there is none."""

CHUNK = 512
"""Tokens of a prompt that go in at once: the others' next tokens wait no longer than for these."""


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A prompt of at least one token, and how it continues.

    ends: tokens after which nothing follows.  until: asked after each token, given all that were
    generated, whether to stop; its answer must be the same on all ranks.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    pick: Pick
    ends: frozenset[int] = frozenset()
    until: Callable[[Sequence[int]], bool] = lambda generated: False


@dataclass(frozen=True, slots=True)
class Token:
    """A token that continues a request; None where it ends without one.  end: why it is the last."""

    request: int
    id: int | None
    end: End | None


@dataclass(slots=True)
class GenerationSpeed:
    """Tokens and seconds: of forwards in which a prompt goes in, and of those that only continue.

    new_steps: the latter; new_seen: tokens that their rows saw, all together.  graphs: of decode
    steps (replay.py), each recorded in a step that counts as neither.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0
    new_steps: int = 0
    new_seen: int = 0
    graphs: int = 0
    graph_seconds: float = 0.0

    def describe(self) -> str:
        """One line."""
        parts = []
        for name, tokens, seconds in (
            ("prefill", self.prompt_tokens, self.prompt_seconds),
            ("decode", self.new_tokens, self.new_seconds),
        ):
            rate = f"{tokens / seconds:,.1f} tokens/s" if seconds > 0 else "none"
            parts.append(f"{name} {tokens:,} tokens, {rate}")
        if self.graphs:
            parts.append(f"{self.graphs} graphs recorded in {self.graph_seconds:.1f} s")
        return "; ".join(parts)


@dataclass(slots=True)
class _Row:
    """A request in flight; entering: tokens that have not gone in yet; longest: of all it may have."""

    request: int
    asked: TextRequest
    longest: int
    entering: list[int]
    tokens: list[int]
    generated: list[int] = field(default_factory=list)


class RunningBatch:
    """Rows of a batch that requests join and leave while the others continue.

    Every rank of the model makes the same calls.  capacity, start: see KeyValueCache; without start
    rows grow where a request does not fit.  remember: a request whose text begins as one that was
    here before does continues behind what both have.
    """

    def __init__(
        self, model: Decoder, rows: int, capacity: int, *, start: int | None = None,
        chunk: int = CHUNK, speed: GenerationSpeed | None = None, remember: bool = False,
    ) -> None:  # fmt: skip
        self._held = CachedRows(model, rows, capacity, start=start, record=recorder(model))
        self._chunk, self.speed = chunk, speed or GenerationSpeed()
        self._endless, self._remember = start is not None, remember
        self._places: list[_Row | None] = [None] * rows
        self._seen: list[list[int]] = [[] for _ in range(rows)]

    @property
    def has_place(self) -> bool:
        """Whether another request can join."""
        return None in self._places

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to continue."""
        return not any(self._places)

    def join(self, request: int, asked: TextRequest) -> None:
        """The request, under its number, takes a place that is free."""
        held, longest = self._held, longest_text(self._held.model, asked)
        # where positions end, the end of a prompt says more than its beginning
        prompt = list(asked.prompt)[-longest:]
        if longest > held.capacity and not self._endless:
            held.grow(max(longest, 2 * held.capacity))
        free = [number for number, row in enumerate(self._places) if row is None]
        known = [self._known(number, prompt, longest) for number in free]
        behind = max(known)
        place = free[known.index(behind)]
        held.free(place, longest, behind=behind)
        self._seen[place] = prompt[:behind]
        self._places[place] = _Row(request, asked, longest, prompt[behind:], list(prompt))

    def _known(self, place: int, prompt: Sequence[int], longest: int) -> int:
        """Tokens that the prompt begins with whose keys and values this row has, as it would make them."""
        held, seen = self._held, self._seen[place]
        # the last one has to go in: what follows it is asked for
        pairs = zip(seen, prompt[:-1], strict=False)
        common = next(
            (n for n, (a, b) in enumerate(pairs) if a != b), min(len(seen), len(prompt) - 1)
        )
        scaled = held.model.context.model.rope_scaling_type in BY_LENGTH
        if scaled and held.whole(place) != min(longest, held.capacity):
            return 0  # its positions are those of a text of another length
        lost = len(seen) > held.capacity and common < len(seen)  # the ring has turned beyond it
        return 0 if lost else common

    def leave(self, request: int) -> None:
        """Nothing more of it is wanted."""
        self._places = [row if row and row.request != request else None for row in self._places]

    def step(self) -> list[Token]:
        """One forward, in which each row takes what is entering, and the tokens that come of it."""
        began, held, places = time.perf_counter(), self._held, self._places
        new: list[list[int]] = []
        for number, row in enumerate(places):
            takes = 0 if row is None else min(self._chunk, held.room(number), len(row.entering))
            new.append([] if row is None else row.entering[:takes])
        graphs = held.recorded
        logits = held.forward(new)
        entered = sum(map(len, new))
        if self._remember:
            for seen, tokens in zip(self._seen, new, strict=True):
                seen += tokens
        prefills = any(row is not None and not row.generated for row in places)
        ready = []
        for number, row in enumerate(places):
            if row is not None:
                del row.entering[: len(new[number])]
                if not row.entering:
                    ready.append((number, row))
        chosen = self._chosen(logits, ready)
        self._count(
            time.perf_counter() - began, entered, prefills=prefills, recorded=held.recorded > graphs
        )
        found = []
        for (number, row), token in zip(ready, chosen, strict=True):
            found.append(_taken(row, token))
            if found[-1].end is not None:
                places[number] = None
        return found

    def _count(self, seconds: float, tokens: int, *, prefills: bool, recorded: bool) -> None:
        """A step's tokens and time, for the kind of step that it was."""
        speed, held = self.speed, self._held
        if recorded:
            speed.graphs, speed.graph_seconds = speed.graphs + 1, speed.graph_seconds + seconds
        elif prefills:
            speed.prompt_tokens += tokens
            speed.prompt_seconds += seconds
        else:
            speed.new_tokens += tokens
            speed.new_seconds += seconds
            speed.new_steps += 1
            rows = [number for number, row in enumerate(self._places) if row is not None]
            speed.new_seen += sum(min(held.length(row), held.capacity) for row in rows)

    def _chosen(self, logits: Tensor | None, ready: Sequence[tuple[int, _Row]]) -> list[int]:
        """The next token of each row that is ready, on every rank."""
        ctx = self._held.ctx
        chosen = torch.zeros(len(ready), dtype=torch.int64, device=ctx.device)
        if logits is not None:
            largest = logits.amax(dim=-1)  # [rows]; not finite where any is not
            finite = largest == largest.clamp(-_LARGEST, _LARGEST)
            for place, (number, row) in enumerate(ready):
                chosen[place] = row.asked.pick(logits[number : number + 1], row.tokens)[0]
            if len(ready) < len(finite):
                finite = finite[[number for number, _ in ready]]
            chosen.masked_fill_(~finite, _NOT_FINITE)
        if ready:
            all_reduce(chosen, ctx.pp)  # zeros on the stages before the last
        found: list[int] = chosen.tolist()  # waits for the device
        if _NOT_FINITE in found:
            row = ready[found.index(_NOT_FINITE)][1]
            raise NumericsError(
                f"the model's logits are not finite after {len(row.tokens)} tokens of a text, in "
                f"{self._held.model.context.dtype}: try --dtype float32, or another checkpoint"
            )
        return found


def _taken(row: _Row, token: int) -> Token:
    """The row continues with a token, or ends."""
    if token in row.asked.ends:
        return Token(row.request, None, "eod")
    full = len(row.tokens) >= row.longest  # it has no position behind those it has
    row.generated.append(token)
    row.tokens.append(token)
    row.entering = [token]
    end: End | None = None
    if row.asked.until(row.generated):
        end = "stop"
    elif len(row.generated) >= row.asked.max_new_tokens:
        end = "length"
    elif full:
        end = "positions"
    return Token(row.request, token, end)


def longest_text(model: Decoder, asked: TextRequest) -> int:
    """Tokens of prompt and continuation that the model has positions for."""
    assert asked.prompt, "a prompt has at least one token (the end-of-document token, say)"
    config = model.context.model
    wanted = len(asked.prompt) + asked.max_new_tokens
    learned = config.position_embedding_type == "learned_absolute"
    return min(wanted, config.num_positions) if learned else wanted


@dataclass(slots=True)
class Generation:
    """Requests that are continued in the rows of a batch.  Every rank of the model makes the same calls.

    rows: at once.  keep: tokens of which a row keeps the keys and values, the first `start` of a
    text and the latest others, so that it may be endless; 0 keeps all.  remember: see RunningBatch;
    what one run leaves in the rows another finds, unless it was broken off.
    """

    model: Decoder
    rows: int = 1
    chunk: int = CHUNK
    keep: int = 0
    start: int = 4
    speed: GenerationSpeed = field(default_factory=GenerationSpeed)
    remember: bool = False
    _left: RunningBatch | None = None

    def __post_init__(self) -> None:
        """ConfigError where a text cannot lose its middle."""
        if self.keep and not 0 <= self.start < self.keep:
            raise ConfigError(
                f"--sink-tokens {self.start} must be at least 0 and below --cache-tokens {self.keep}: "
                "the others are the latest"
            )
        if self.keep and self.model.context.model.position_embedding_type == "learned_absolute":
            raise ConfigError(
                f"--cache-tokens {self.keep}: this model has learned positions, which stay with what is "
                "kept of a token; only rotary ones can be counted anew - leave it out"
            )

    def run(self, requests: Sequence[TextRequest]) -> Iterator[Token]:
        """The tokens of all requests as they come, those of one in order."""
        batch, self._left = self._left or self._batch(requests), None
        waiting = deque(enumerate(requests))
        while waiting or not batch.is_empty:
            while waiting and batch.has_place:
                batch.join(*waiting.popleft())
            yield from batch.step()
        self._left = batch if self.remember else None

    def _batch(self, requests: Sequence[TextRequest]) -> RunningBatch:
        longest = [longest_text(self.model, asked) for asked in requests]
        rows = self.rows if self.remember else min(self.rows, len(requests))
        return RunningBatch(
            self.model, max(rows, 1), self.keep or max(longest, default=1),
            start=self.start if self.keep else None, chunk=self.chunk, speed=self.speed,
            remember=self.remember,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Continuation:
    """Generated ids without the prompt, and whether the end-of-document token ended them."""

    ids: list[int]
    ended: bool


def generate(
    model: Decoder, prompt: Sequence[int], *, max_new_tokens: int, pick: Pick, eod: int | None
) -> Continuation:
    """Continue one prompt of at least one token, reusing keys and values.

    Stops at eod, after max_new_tokens, or where the position table ends.  Positions that are scaled by
    length (--rope-scaling-type) are so from the first token on for prompt and max_new_tokens together.
    """
    ends = frozenset(() if eod is None else (eod,))
    ids, ended = [], False
    for token in Generation(model).run([TextRequest(prompt, max_new_tokens, pick, ends)]):
        ids += [] if token.id is None else [token.id]
        ended = token.end == "eod"
    return Continuation(ids, ended)
