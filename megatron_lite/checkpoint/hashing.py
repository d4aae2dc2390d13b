"""Content hashes, computed beside the reading and writing of the content."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from megatron_lite.storage.disk import Bytes

_AHEAD = 2  # buffers that may wait to be hashed: they are kept in memory
_SMALL = 1 << 20  # bytes below which a thread costs more than it saves


class Hasher:
    """sha256 of a stream, in a thread of its own: hashlib lets the others run meanwhile.

    A buffer handed to update() may not change before the digest is taken.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._thread: ThreadPoolExecutor | None = None
        self._pending: deque[Future[None]] = deque()

    def update(self, data: Bytes) -> None:
        """Append to the stream; returns before it is hashed where it is long."""
        if self._thread is None and memoryview(data).nbytes < _SMALL:
            self._hash.update(data)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoint-hash")
        while len(self._pending) >= _AHEAD:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._hash.update, data))

    def hexdigest(self) -> str:
        """The hash of all that was appended."""
        while self._pending:
            self._pending.popleft().result()
        return self._hash.hexdigest()

    def __enter__(self) -> Hasher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown()
