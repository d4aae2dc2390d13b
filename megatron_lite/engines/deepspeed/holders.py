"""Modules that hold our parameters layer by layer, so that DeepSpeed's hooks know when which are read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn


class Layer(nn.Module):
    """The parameters that one layer reads; one may be another layer's, too (a tied table)."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        for number, parameter in enumerate(parameters):
            self.register_parameter(f"p{number}", parameter)  # type: ignore[arg-type]


class Layers(nn.Module):
    """What deepspeed.initialize is given for a model: a forward is whatever it is told to run."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """run()."""
        return run()


class GatheringHooks:
    """Around a layer's forward and backward: DeepSpeed gathers its parameters (ZeRO-3), and those after it.

    offload: of an engine that has begun, the owner of its hooks.  looks_up: the layer is of tables, which
    autograd gives gradients after the hooks, and in their shape: DeepSpeed itself takes them apart when
    the whole backward ends.
    """

    def __init__(self, layer: Layer, offload: Callable[[], Any], *, looks_up: bool) -> None:
        self._layer, self._offload, self._looks_up = layer, offload, looks_up

    def before_forward(self) -> None:
        """Gather."""
        self._offload().pre_sub_module_forward_function(self._layer)

    def after_forward(self) -> None:
        """Take apart."""
        offload = self._offload()
        offload.post_sub_module_forward_function(self._layer)
        # a stack of the layers whose forward runs, which DeepSpeed's own hooks shorten, no function of it
        sys.modules[type(offload).__module__].FWD_MODULE_STACK.pop()  # type: ignore[attr-defined]

    def before_backward(self, *, reads: bool) -> None:
        """Gather again."""
        self._offload().pre_sub_module_backward_function(self._layer)

    def after_backward(self) -> None:
        """Take apart again."""
        if not self._looks_up:
            self._offload().post_sub_module_backward_function(self._layer)
