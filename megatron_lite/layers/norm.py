"""LayerNorm and RMSNorm; with sequence parallelism their gradients are summed over tp."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_lite.blueprint.figure import parts
from megatron_lite.kernels.dropout import DropoutCall
from megatron_lite.layers.contexts import StageContext


class NormLayer(nn.Module):
    """LayerNorm or RMSNorm (arXiv:1607.06450, 1910.07467) over h, or over the d channels of every head.

    weight [h], and bias [h] where it has one.
    """

    def __init__(self, context: StageContext, part: parts.Norm) -> None:
        super().__init__()
        self.part, self.epsilon = part, context.model.norm_epsilon
        self.weight = context.parameter(part.width)
        self.bias = context.parameter(part.width) if part.bias else None
        op = "layer_norm" if part.function == "LayerNorm" else "rms_norm"
        self.norm, self.add_and_norm = context.choose(op), context.choose(f"add_dropout_{op}")

    def forward(
        self, x: Tensor, *part: Tensor | DropoutCall | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: [s/tp, b, h] with sequence parallelism, else [s, b, h] -> the same; statistics over h in fp32.

        part: y, bias and dropout of what is to be added to x first, see kernels' add_dropout; then
        the result is (sum, norm of the sum), by one kernel.
        """
        weight = self.weight + 1.0 if self.part.less_one else self.weight
        if part:
            return self.add_and_norm(x, *part, weight, self.bias, self.epsilon)
        return self.norm(x, weight, self.bias, self.epsilon)
