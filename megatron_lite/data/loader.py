"""Micro batches for one data parallel rank, read ahead by threads."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from megatron_lite.data.batch import Batch, collate
from megatron_lite.data.documents import WITHOUT_ENDS, DocumentEnds
from megatron_lite.data.sampler import Order, OrderKind, Permute, _Int64, sample_numbers
from megatron_lite.data.samples import Samples

STEPS_AHEAD = 2


class BatchRequest(NamedTuple):
    """One step's share: the samples from `consumed` on, in so many micro batches of `micro`."""

    consumed: int
    micro: int
    num_microbatches: int


class Loader:
    """Reads the micro batches of a step; guesses that the next step continues and reads it ahead.

    num_workers threads read; 0 reads in the caller.  `seconds_waited` is the time the caller
    spent in next_batches so far.  An error in a thread is raised in the caller when the batch
    it belongs to is asked for.  There is no state: any `consumed` may be asked for at any time.
    prepare: what a thread does to each micro batch that it has read.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        dp_rank: int,
        dp_size: int,
        num_workers: int = 2,
        documents: DocumentEnds = WITHOUT_ENDS,
        order: OrderKind = "single",
        sharding: bool = True,
        permute: Permute | None = None,
        prepare: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self.dataset = dataset
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.documents = documents
        self.seconds_waited = 0.0
        self._prepare = prepare
        self._order = Order(
            order, len(dataset), dataset.name, dp_size=dp_size, sharding=sharding, permute=permute
        )
        self._threads: ThreadPoolExecutor | None = None
        if num_workers > 0:
            self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="data")
        self._ahead: OrderedDict[BatchRequest, list[Future[Batch]]] = OrderedDict()

    def next_batches(self, consumed: int, micro: int, num_microbatches: int) -> list[Batch]:
        """This rank's micro batches of the global batch that begins at `consumed`."""
        began = time.perf_counter()
        request = BatchRequest(consumed, micro, num_microbatches)
        try:
            if self._threads is None:
                return [self._read(numbers) for numbers in self._numbers(request)]
            futures = self._ahead.pop(request, None)
            if futures is None:
                self._forget()
                futures = self._submit(request)
            self._read_ahead(request)
            return [future.result() for future in futures]
        finally:
            self.seconds_waited += time.perf_counter() - began

    def close(self) -> None:
        """Stop the threads; what was read ahead is dropped."""
        self._forget()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _numbers(self, request: BatchRequest) -> _Int64:
        return sample_numbers(*request, dp_rank=self.dp_rank, dp_size=self.dp_size)

    def _read(self, positions: _Int64) -> Batch:
        samples = [self.dataset[int(number)] for number in self._order(positions, len(positions))]
        batch = collate(samples, positions, self.documents)
        return batch if self._prepare is None else self._prepare(batch)

    def _submit(self, request: BatchRequest) -> list[Future[Batch]]:
        assert self._threads is not None
        return [self._threads.submit(self._read, numbers) for numbers in self._numbers(request)]

    def _read_ahead(self, request: BatchRequest) -> None:
        size = request.num_microbatches * request.micro * self.dp_size
        for step in range(1, STEPS_AHEAD + 1):
            guess = request._replace(consumed=request.consumed + step * size)
            end_of_data = guess.consumed + size > len(self.dataset)
            if guess not in self._ahead and not (end_of_data and self._order.kind == "single"):
                self._ahead[guess] = self._submit(guess)

    def _forget(self) -> None:
        for futures in self._ahead.values():
            for future in futures:
                future.cancel()
        self._ahead.clear()
