"""MLP (GELU) and GatedMLP (SwiGLU) with the features split over tp."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_lite.kernels.table import choose
from megatron_lite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_lite.layers.setting import Setting


class MLP(nn.Module):
    """down(gelu(up(x))) with one all-reduce, after down (arXiv:1909.08053 § 3)."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        model = setting.model
        h, f, bias = model.hidden_size, model.ffn_size, model.add_bias_linear
        self.up = ColumnParallelLinear(setting, h, {"up": f}, bias=bias)
        self.down = RowParallelLinear(setting, f, h, bias=bias)
        form = "gelu" if model.gelu == "tanh" else "gelu_erf"
        self.gelu = choose(form, setting.need()).run

    def forward(self, x: Tensor) -> Tensor:
        """x: [s/tp, b, h] with sequence parallelism, else [s, b, h] -> the same."""
        return self.down(self.gelu(self.up(x)))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202); gate and up are one matrix in memory."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        model = setting.model
        h, f, bias = model.hidden_size, model.ffn_size, model.add_bias_linear
        self.gate_up = ColumnParallelLinear(setting, h, {"gate": f, "up": f}, bias=bias)
        self.down = RowParallelLinear(setting, f, h, bias=bias)
        self.swiglu = choose("swiglu", setting.need()).run

    def forward(self, x: Tensor) -> Tensor:
        """x: [s/tp, b, h] with sequence parallelism, else [s, b, h] -> the same."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.swiglu(gate, up))
