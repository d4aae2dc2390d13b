"""Numbers on their way from the device to the host, read when they have long been there."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of some numbers in pinned memory, begun at once and waited for by nobody but read().

    On a CPU they are there when the copy is begun.
    """

    def __init__(self, numbers: Tensor) -> None:
        on_gpu = numbers.device.type == "cuda"
        # elsewhere they stay where they are: a rehearsal's tensors have no values
        where = "cpu" if on_gpu else numbers.device
        self._host = torch.empty_like(numbers, device=where, pin_memory=on_gpu)
        self._host.copy_(numbers, non_blocking=True)
        self._done = torch.cuda.Event() if on_gpu else None
        if self._done is not None:
            self._done.record()

    @property
    def is_there(self) -> bool:
        """Whether read() would not wait."""
        return self._done is None or self._done.query()

    def read(self) -> list[float]:
        """The numbers; waits for the device where it has not come so far yet."""
        if self._done is not None:
            self._done.synchronize()
        return [float(number) for number in self._host.tolist()]
