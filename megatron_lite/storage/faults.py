"""Disks for tests: one records every operation, one fails or crashes at the k-th."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Literal

from megatron_lite.storage.disk import Disk, Operation, _Result

NEEDS_SPACE = ("make_folder", "create", "write", "try_out")


class SimulatedCrash(BaseException):
    """The process is dead: not an Exception, so that no handler of the program mends it."""


class RecordingDisk(Disk):
    """Carries everything out and remembers what it was, in order."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def _operate(self, operation: Operation, action: Callable[[], _Result]) -> _Result:
        # the bytes are not kept: a recording of a checkpoint must not hold the checkpoint
        self.operations.append(Operation(operation.kind, operation.path, operation.target))
        return super()._operate(operation, action)


class FaultyDisk(RecordingDisk):
    """Fails at operation number `fail_at` (from 0): with an error number, or by a crash.

    error: raise OSError(error); with `lasting`, every later operation that needs space fails too
    (a full disk stays full).  crash "raise": SimulatedCrash now and at every later operation, for
    a dead process cleans nothing up; crash "kill": SIGKILL to this process.
    `tear` writes the first half of the buffer if the operation is a write.
    `kinds` counts only operations of these kinds.
    """

    def __init__(
        self,
        *,
        fail_at: int,
        error: int | None = None,
        crash: Literal["raise", "kill"] | None = None,
        tear: bool = False,
        lasting: bool = False,
        kinds: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        assert (error is None) != (crash is None), "choose an error number or a kind of crash"
        self.fail_at = fail_at
        self.error = error
        self.crash = crash
        self.tear = tear
        self.lasting = lasting
        self.kinds = kinds
        self.failed = False
        self._count = 0

    def _operate(self, operation: Operation, action: Callable[[], _Result]) -> _Result:
        if self.failed and self._fails_again(operation):
            self._fail()
        if self.kinds is None or operation.kind in self.kinds:
            number, self._count = self._count, self._count + 1
            if number == self.fail_at:
                if self.tear and operation.kind == "write" and operation.append is not None:
                    assert operation.data is not None
                    operation.append(operation.data[: operation.data.nbytes // 2])
                self._fail()
        return super()._operate(operation, action)

    def _fails_again(self, operation: Operation) -> bool:
        return self.crash is not None or (self.lasting and operation.kind in NEEDS_SPACE)

    def _fail(self) -> None:
        self.failed = True
        if self.crash == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.crash is not None:
            raise SimulatedCrash(f"crash at operation {self.fail_at}")
        assert self.error is not None
        raise OSError(self.error, os.strerror(self.error))
