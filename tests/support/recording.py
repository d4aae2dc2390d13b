"""A CUDA graph's twin on a CPU: the ops of a function of tensors, recorded once and run again.

As in a graph every number that did not come out of a tensor is a constant, and an op that asks for a
tensor's value has no place in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

WAITS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero")
"""Ops whose result the host waits for."""


class _Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__.split(".")[0]  # type: ignore[attr-defined]
        assert name not in WAITS, f"{name} waits for the device"
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made


def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What run does, again, on the values that its tensors have then."""
    run()  # sets up what a first call does
    with _Ops() as ops:
        result = run()

    def again() -> Tensor:
        now: dict[int, Tensor] = {}

        def current(value: Any) -> Any:
            return now.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, recorded in ops.calls:
            made = func(*tree_map(current, args), **tree_map(current, kwargs))
            for old, new in zip(tree_leaves(recorded), tree_leaves(made), strict=True):
                if isinstance(old, Tensor):
                    now[id(old)] = new
        return now.get(id(result), result)

    return again
