"""The thread that owns the model: jobs come in from any thread, their tokens go out as they come.

    submit ─▶ waiting, first come first served ─▶ a row of the running batch ─▶ deliver tokens, Ending

A failure of the model ends the jobs that were in the batch, each with what went wrong; those that
wait go on in a new batch.  Three in a row without a token between them, and nothing is tried again;
one is enough where other ranks share the model, which do not begin anew with this one.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_lite.inference.generate import RunningBatch, TextRequest, Token
from megatron_lite.inference.serving.picking import Chance, Picker

TRIES = 3
"""Failures of the model without a token between them after which it is given up."""

REST_SECONDS = 2.0
"""Between two looks after the other ranks while nothing is asked."""


@dataclass(frozen=True, slots=True)
class AnswerToken:
    """A token of a job's answer."""

    id: int
    chance: Chance | None


@dataclass(frozen=True, slots=True)
class Ending:
    """Nothing follows: the answer is whole, it reached its length, or the model failed."""

    why: str  # "stop", "length", "failed", or "down" where nothing is tried again


class AnswerJob:
    """One answer that is wanted.  deliver: called from the model's thread, and must not wait."""

    def __init__(
        self, request: TextRequest, picker: Picker, deliver: Callable[[AnswerToken | Ending], None]
    ) -> None:
        self.request, self.picker, self.deliver = request, picker, deliver
        self.cancelled = False

    def cancel(self) -> None:
        """Its answer is not wanted: its row is free before the next token."""
        self.cancelled = True


class Full(Exception):
    """More jobs wait than may."""


class Down(Exception):
    """The model was given up, or is no longer served."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a model thread is doing; crashes: since it began."""

    running: int
    waiting: int
    crashes: int
    down: bool


class ModelThread:
    """Carries out jobs, in as many rows at once as its batch has.

    make_batch: a new, empty one, at the start and after a failure.  given_up: called once when
    nothing is tried again, after so many failures in a row.  rest: called now and then, where
    nothing is asked; None: the thread sleeps.
    """

    def __init__(
        self,
        make_batch: Callable[[], RunningBatch],
        *,
        max_waiting: int,
        given_up: Callable[[], None] = lambda: None,
        tries: int = TRIES,
        rest: Callable[[], None] | None = None,
    ) -> None:
        self._make_batch, self._max_waiting, self._given_up = make_batch, max_waiting, given_up
        self._tries, self._rest = tries, rest
        self.failure: BaseException | None = None  # the one after which nothing is tried again
        self._waiting: deque[AnswerJob] = deque()
        self._running: dict[int, AnswerJob] = {}
        self._numbered = 0
        self._changed = threading.Condition()
        self._closing, self._down = False, False
        self._crashes, self._vain = 0, 0  # in all, and since the latest token
        self._thread = threading.Thread(target=self._serve, name="model", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, jobs: Sequence[AnswerJob]) -> None:
        """All of them or none; raises Full or Down."""
        with self._changed:
            if self._down or self._closing:
                raise Down
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
            if len(self._waiting) + len(jobs) > self._max_waiting:
                raise Full
            self._waiting.extend(jobs)
            self._changed.notify()

    @property
    def load(self) -> Load:
        """At this moment."""
        with self._changed:
            waiting = sum(not job.cancelled for job in self._waiting)
            return Load(len(self._running), waiting, self._crashes, self._down)

    def close(self, seconds: float = 10.0) -> bool:
        """End what is in flight; the thread stops after its step.  Returns whether it has."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def give_up(self) -> None:
        """End all answers, from another thread: the step that this one is in may never end."""
        with self._changed:
            self._down = True
            self._changed.notify()
        self._end_all(running_only=False)
        self._given_up()

    def _serve(self) -> None:
        while not (self._closing or self._down):
            try:
                self._carry_on(self._make_batch())
            except BaseException as error:  # whatever it is: those who wait must hear of it
                self._crashed(error)
            gc.collect()  # a batch refers to itself, and the next one needs the memory of its cache
        self._end_all(running_only=False)

    def _carry_on(self, batch: RunningBatch) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closing or self._down or self._waiting or self._running,
                    None if self._rest is None else REST_SECONDS,
                )
                if self._closing or self._down:
                    return
                self._leave(batch)
                self._join(batch)
            if batch.is_empty:
                if self._rest is not None:
                    self._rest()
                continue
            for token in batch.step():
                self._hand_on(token)

    def _leave(self, batch: RunningBatch) -> None:
        for number, job in list(self._running.items()):
            if job.cancelled:
                batch.leave(number)
                del self._running[number]

    def _join(self, batch: RunningBatch) -> None:
        while self._waiting and batch.has_place:
            job = self._waiting.popleft()
            if not job.cancelled:
                self._numbered += 1
                batch.join(self._numbered, job.request)
                self._running[self._numbered] = job

    def _hand_on(self, token: Token) -> None:
        self._vain = 0
        with self._changed:
            job = self._running.get(token.request)
            if job is None:  # it was given up
                return
            if token.end is not None:
                del self._running[token.request]
        if token.id is not None:
            job.deliver(AnswerToken(token.id, job.picker.chance))
        if token.end is not None:
            job.deliver(Ending("stop" if token.end == "eod" else "length"))

    def _crashed(self, error: BaseException) -> None:
        with self._changed:
            if self._down:  # given up from outside, and now its step has ended, too
                return
            self._crashes += 1
            self._vain += 1
            self._down = self._vain >= self._tries or not isinstance(error, Exception)
            running = len(self._running)
        times = f"{self._vain} times in a row: it" if self._vain > 1 else "it"
        print(
            f"ERROR: the model failed with {running} answers in flight, which end here; "
            + (f"{times} is given up" if self._down else "it begins again"),
            file=sys.stderr,
        )
        if self._tries > 1:  # of the only one the program's end speaks
            traceback.print_exception(error)
        self._end_all(running_only=not self._down)
        if self._down:
            self.failure = error
            self._given_up()
        else:
            time.sleep(0.1 * self._vain)

    def _end_all(self, *, running_only: bool) -> None:
        with self._changed:
            jobs = list(self._running.values())
            self._running.clear()
            if not running_only:
                jobs += self._waiting
                self._waiting.clear()
            ending = Ending("down" if self._down or self._closing else "failed")
        for job in jobs:
            job.deliver(ending)
