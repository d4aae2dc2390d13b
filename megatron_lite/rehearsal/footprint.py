"""Bytes of all live tensors, counted as they are made and freed, on any device or on meta."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode


class Footprint(TorchDispatchMode):
    """While active, counts the storage of every tensor an operation makes on one type of device.

    now: bytes that live; peak: the most there were; allocations: how many storages were made.
    What a kernel takes for itself and gives back before it ends is not seen.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.now = self.peak = self.allocations = 0
        self._elsewhere = False
        self._away: dict[int, weakref.ref[UntypedStorage]] = {}
        self._living: dict[int, tuple[int, weakref.ref[UntypedStorage]]] = {}

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once; or what it has grown or shrunk by."""
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        name, size = storage._cdata, storage.nbytes()
        if name in self._living:
            before, reference = self._living[name]
            if before == size:
                return
        else:
            if name in self._away:
                return
            if self._elsewhere:
                self._away[name] = weakref.ref(storage, lambda _: self._away.pop(name))
                return
            before, reference = 0, weakref.ref(storage, lambda _: self._gone(name))
            self.allocations += 1
        self._living[name] = size, reference
        self._grow(size - before)

    def __enter__(self) -> Any:
        """Hear of storages that are resized, too: no operation does that."""
        plain, resized = UntypedStorage.resize_, self._resized

        def resize_(storage: UntypedStorage, size: int) -> UntypedStorage:
            plain(storage, size)
            resized(storage)
            return storage

        self._plain = plain
        UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        """As it was."""
        UntypedStorage.resize_ = self._plain  # type: ignore[method-assign]
        super().__exit__(*raised)

    def _resized(self, storage: UntypedStorage) -> None:
        known = self._living.get(storage._cdata)
        if known is not None:
            before, reference = known
            self._living[storage._cdata] = storage.nbytes(), reference
            self._grow(storage.nbytes() - before)

    def _grow(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is made within lies in other memory than the device's."""
        before, self._elsewhere = self._elsewhere, True
        try:
            yield
        finally:
            self._elsewhere = before

    def lies_here(self, tensor: Tensor) -> bool:
        """Whether its storage is counted."""
        return tensor.untyped_storage()._cdata in self._living

    def _gone(self, name: int) -> None:
        self.now -= self._living.pop(name)[0]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Carry the operation out and see what it makes."""
        made = func(*args, **(kwargs or {}))
        self.see_all(made)
        return made

    def see_all(self, made: Any) -> None:
        """Count what an operation gives: a tensor, several, or none."""
        if isinstance(made, Tensor):
            self.see(made)
        elif isinstance(made, list | tuple):
            for one in made:
                if isinstance(one, Tensor):
                    self.see(one)
