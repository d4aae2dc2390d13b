"""All-gathers of updated parameters, begun shortly before they are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from megatron_lite.blueprint.buckets import IN_FLIGHT
from megatron_lite.engines.bucket import Bucket


class Gathers:
    """Those of an update, in one order on all replicas: about the order in which forward needs them.

    IN_FLIGHT at once: the next one starts when the oldest has been waited for.  More would hold more
    copies, and hold up what a device enqueues behind them.
    """

    def __init__(self) -> None:
        self._flying: deque[Bucket] = deque()
        self._later: deque[Bucket] = deque()

    def start(self, buckets: Iterable[Bucket]) -> None:
        """Start the first of them; the others follow as these are waited for."""
        assert not self._flying, "the last update's parameters are still being gathered"
        self._later.extend(buckets)
        while self._later and len(self._flying) < IN_FLIGHT:
            self._start_next()

    def wait_for(self, bucket: Bucket) -> None:
        """Wait until a bucket is gathered, and all before it; at once where nothing is in flight."""
        # by the one order, whatever is asked for first: replicas may not start in different ones
        while bucket in self._flying or bucket in self._later:
            self._finish_oldest()

    def wait_for_all(self) -> None:
        """Wait until every bucket is gathered."""
        while self._flying:
            self._finish_oldest()

    def _start_next(self) -> None:
        bucket = self._later.popleft()
        bucket.start_gather()
        self._flying.append(bucket)

    def _finish_oldest(self) -> None:
        self._flying.popleft().finish_gather()
        if self._later:
            self._start_next()
