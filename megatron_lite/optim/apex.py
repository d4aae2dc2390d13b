"""AdamW by apex's fused kernel, where --optimizer apex-adam asks for it; imported then, not before."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite.config.errors import ConfigError
from megatron_lite.optim.adam import AdamW

_CHUNK = 2048 * 32
"""Elements of a block of apex's kernels, as its own optimizers have it."""
_DECOUPLED, _CORRECTED = 1, 1


def _kernel() -> Any:
    # the one for CUDA graphs: of apex's two it alone reads on the device whether it shall work
    return importlib.import_module("amp_C").multi_tensor_adam_capturable


@dataclass(slots=True)
class ApexAdamW:
    """The formula and states of AdamW, all in fp32; apex is NVIDIA's, built from its source."""

    beta1: float
    beta2: float
    eps: float

    def check(self, device: torch.device) -> None:
        """See UpdateRule; without memory nothing of apex runs."""
        if device.type == "meta":
            return
        instead = "use --optimizer adam, whose states in checkpoints are the same"
        if device.type != "cuda":
            raise ConfigError(
                f"--optimizer apex-adam needs a GPU, and this run is on {device.type}; {instead}"
            )
        try:
            _kernel()
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            raise ConfigError(
                f"--optimizer apex-adam: apex's amp_C is not importable ({type(error).__name__}: {error}) "
                f"- docs/guides/install-gpu.md says how it is built; or {instead}"
            ) from None

    @torch.no_grad()
    def update(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        *,
        steps: int,
        lr: float,
        weight_decay: float,
        taken: Tensor | None = None,
    ) -> None:
        """One step, in place, as AdamW.update."""
        if not parameters:
            return
        device = parameters[0].device
        if device.type == "meta":
            AdamW(self.beta1, self.beta2, self.eps).update(
                parameters, gradients, states,
                steps=steps, lr=lr, weight_decay=weight_decay, taken=taken,
            )  # fmt: skip
            return

        def scalar(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((1,), value, dtype=dtype, device=device)

        moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        left_out = scalar(0, torch.int32) if taken is None else taken.logical_not().int().reshape(1)
        _kernel()(
            _CHUNK, left_out, [list(gradients), list(parameters), *moments],
            scalar(lr, torch.float32), self.beta1, self.beta2, self.eps,
            scalar(steps + 1, torch.int32), _DECOUPLED, _CORRECTED, weight_decay,
            scalar(1.0, torch.float32),  # on every gradient; it writes them back
        )  # fmt: skip
