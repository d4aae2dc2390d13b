"""Calls an engine's hooks around the forward and the backward of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lite.parallel.layer_hooks import LayerHooks


class _Told(torch.autograd.Function):
    """The same tensor; its gradient, once complete, calls the hook before it flows on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tell: Callable[[], None]) -> Tensor:
        ctx.tell = tell
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        ctx.tell()
        return dx, None


def around(hooks: LayerHooks | None, run: Callable[..., Tensor], x: Tensor, *more: Any) -> Tensor:
    """run(x, *more) between the hooks; without hooks that alone.

    x: activations, or the tokens of the first layer.
    """
    if hooks is None:
        return run(x, *more)
    looks_up = not x.is_floating_point()
    if torch.is_grad_enabled() and x.requires_grad:
        x = _Told.apply(x, hooks.after_backward)
    hooks.before_forward()
    y = run(x, *more)
    hooks.after_forward()
    if not y.requires_grad:
        return y

    def begin() -> None:
        # the backward of a table adds rows to its gradient and reads no weight
        hooks.before_backward(reads=not looks_up)
        if looks_up:
            hooks.after_backward()

    told: Tensor = _Told.apply(y, begin)
    return told
