"""Number formats, loss scaling, and which kernels are preferred."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    """Number formats, loss scaling and preferred kernels."""

    fp16: bool = False
    """Parameters and activations in fp16, fp32 masters, dynamic loss scale."""

    bf16: bool = False
    """Parameters and activations in bf16, fp32 masters."""

    loss_scale: float | None = None
    """Fixed fp16 loss scale instead of the dynamic one."""

    initial_loss_scale: float = 2.0**32
    """Where the dynamic loss scale starts."""

    min_loss_scale: float = 1.0
    """The dynamic loss scale never falls below this."""

    loss_scale_window: int = 1000
    """Successful steps in a row after which the loss scale doubles."""

    hysteresis: int = 2
    """Overflows tolerated before the loss scale halves."""

    loss_scale_patience: int = 100
    """Overflows in a row at the smallest (or fixed) loss scale after which the run stops."""

    attention_backend: Literal["auto", "flash", "fa4", "fused", "unfused", "local"] = "auto"
    """Which attention kernel is preferred (docs/guides/attention.md); which runs, and why, is printed."""

    kernel: list[str] = field(default_factory=list)
    """OP=ROW, or ROW of every op that has it: which kernel runs (tools/kernels.py has the table)."""

    masked_softmax_fusion: bool = True
    """Let the attention kernel fuse mask and softmax; off takes the plain reference kernel."""

    bias_gelu_fusion: bool = True
    """Off means --gelu erf, as in Megatron; the kernels are not fused in any case."""

    bias_swiglu_fusion: bool = True
    """Kept for Megatron's --no-bias-swiglu-fusion; the kernels are not fused."""

    bias_dropout_fusion: bool = True
    """Kept for Megatron's --no-bias-dropout-fusion; the kernels are not fused."""

    gradient_accumulation_fusion: bool = True
    """Linear layers add weight gradients straight to the accumulators; off goes through autograd."""

    torch_compile: Literal["auto", "on", "off"] = field(default="auto", metadata={"switch": True})
    """Compile what stands between two matrix products; auto: on a GPU, where a compiler works."""

    tf32: bool = False
    """Allow TF32 matrix products for fp32 tensors on a GPU."""

    @property
    def name(self) -> Literal["fp32", "fp16", "bf16"]:
        """The parameters' format."""
        return "fp16" if self.fp16 else "bf16" if self.bf16 else "fp32"

    def compiles(self, *, on_gpu: bool) -> bool:
        """Whether the pieces between products are to be compiled on such a device."""
        return self.torch_compile == "on" or (self.torch_compile == "auto" and on_gpu)

    @property
    def products(self) -> str:
        """The format of matrix products, in words: of fp32 tensors they may run in TF32."""
        return "fp32, products in TF32" if self.name == "fp32" and self.tf32 else self.name
