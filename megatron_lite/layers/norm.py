"""LayerNorm and RMSNorm; with sequence parallelism their gradients are summed over tp."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_lite.blueprint.figure import parts
from megatron_lite.kernels.table import choose
from megatron_lite.layers.contexts import StageContext


class NormLayer(nn.Module):
    """LayerNorm or RMSNorm over h; weight [h], and bias [h] where it has one (arXiv:1607.06450, 1910.07467)."""

    def __init__(self, context: StageContext, part: parts.Norm) -> None:
        super().__init__()
        self.part, self.epsilon = part, context.model.norm_epsilon
        self.weight = context.parameter(part.width)
        self.bias = context.parameter(part.width) if part.bias else None
        layer = part.function == "LayerNorm"
        self.run = choose("layer_norm" if layer else "rms_norm", context.need()).run

    def forward(self, x: Tensor) -> Tensor:
        """x: [s/tp, b, h] with sequence parallelism, else [s, b, h] -> the same; statistics over h in fp32."""
        weight = self.weight + 1.0 if self.part.less_one else self.weight
        return self.run(x, weight, self.bias, self.epsilon)
