"""Content hashes, computed beside the reading and writing of the content."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from megatron_lite.storage.disk import Bytes

_Result = TypeVar("_Result")
_MIB = 1 << 20
BLOCKS = "sha256-4MiB"
HASH_KINDS = {BLOCKS: 4 * _MIB, "sha256": None}
"""Kind of hash -> bytes of a block: the sha256 of the blocks' sha256 values, one after the other, so
that one file keeps several cores busy.  None: of the whole content, as manifests before version 2."""

_THREADS = min(4, os.cpu_count() or 1)
_AHEAD = _THREADS + 1  # blocks on their way: they are kept in memory


class Hasher:
    """Hash of a stream, block by block in threads: hashlib lets the others run meanwhile.

    A buffer handed to update() may not change before the digest is taken.
    """

    def __init__(self, kind: str = BLOCKS) -> None:
        self._block = HASH_KINDS[kind]
        self._whole = hashlib.sha256()  # of the digests, or of the content
        self._parts: list[memoryview] = []
        self._filled = 0
        self._threads: ThreadPoolExecutor | None = None
        self._running: deque[Future[bytes]] = deque()

    def update(self, data: Bytes) -> None:
        """Append to the stream; returns before it is hashed."""
        if self._block is None:
            self._whole.update(data)
            return
        view = memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")
        while view.nbytes:
            part = view[: self._block - self._filled]
            self._parts.append(part)
            self._filled += part.nbytes
            view = view[part.nbytes :]
            if self._filled == self._block:
                self._start()

    def _start(self) -> None:
        """Hash the full block in a thread."""
        if len(self._running) == _AHEAD:
            self._whole.update(self._running.popleft().result())
        self._running.append(self._pool().submit(_digest, self._parts))
        self._parts, self._filled = [], 0

    def beside(self, task: Callable[[], _Result]) -> Future[_Result]:
        """Run something in the same threads, in turn with the hashing: for what is still in the cache."""
        return self._pool().submit(task)

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, "checkpoint-hash")
        return self._threads

    def hexdigest(self) -> str:
        """The hash of all that was appended; nothing can be appended any more."""
        last = _digest(self._parts) if self._filled else b""
        while self._running:
            self._whole.update(self._running.popleft().result())
        self._whole.update(last)
        return self._whole.hexdigest()

    def __enter__(self) -> Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads is not None:
            self._threads.shutdown()


def _digest(parts: list[memoryview]) -> bytes:
    block = hashlib.sha256()
    for part in parts:
        block.update(part)
    return block.digest()
