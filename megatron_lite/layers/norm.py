"""LayerNorm and RMSNorm; with sequence parallelism their gradients are summed over tp."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_lite.kernels.table import choose
from megatron_lite.layers.setting import Setting


class Norm(nn.Module):
    """The model's norm over h; weight [h], and bias [h] for LayerNorm (arXiv:1607.06450, 1910.07467)."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        model = setting.model
        self.epsilon = model.norm_epsilon
        self.weight = setting.parameter(model.hidden_size, partial=True)
        layer = model.normalization == "LayerNorm"
        self.bias = setting.parameter(model.hidden_size, partial=True) if layer else None
        self.run = choose("layer_norm" if layer else "rms_norm", setting.need()).run

    def forward(self, x: Tensor) -> Tensor:
        """x: [s/tp, b, h] with sequence parallelism, else [s, b, h] -> the same; statistics over h in fp32."""
        return self.run(x, self.weight, self.bias, self.epsilon)
