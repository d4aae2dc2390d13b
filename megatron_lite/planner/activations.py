"""Bytes a transformer block keeps between its forward and its backward, item by item.

Two counts.  `kept` is what the modules of this project save.  `korthikanti` is the formula of
arXiv:2205.05198, section 4, to compare with published figures; fp16, dropout everywhere, attention
without a fused kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.precision import PrecisionConfig

Variant = Literal["tp", "tp+sp", "tp+selective", "tp+sp+selective", "full"]
VARIANTS: tuple[Variant, ...] = ("tp", "tp+sp", "tp+selective", "tp+sp+selective", "full")
"""The rows of the paper's table 2, in order."""


def korthikanti(model: ModelConfig, *, micro_batch_size: int, tp: int, variant: Variant) -> float:
    """Bytes of activations per layer and micro batch on each rank (arXiv:2205.05198, table 2)."""
    s, h, a = model.seq_length, model.hidden_size, model.num_attention_heads
    unit = float(s * micro_batch_size * h)
    core = 5 * a * s / h
    factor = {
        "tp": 10 + 24 / tp + core / tp,
        "tp+sp": (34 + core) / tp,
        "tp+selective": 10 + 24 / tp,
        "tp+sp+selective": 34 / tp,
        "full": 2.0,
    }[variant]
    return unit * factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """Bytes of one block and micro batch on one rank, by what they are."""

    stream: float
    """Inputs of the two norms: the residual stream."""
    norms: float
    """Outputs of the norms, inputs of the projections; in fp32 twice for the reference RMSNorm."""
    qkv: float
    core: float
    """What attention keeps besides q, k and v: scores, or only a number per row."""
    attended: float
    """Input of the output projection."""
    mlp: float
    """Inputs and outputs of the activation function."""
    masks: float
    """Hidden dropout, a byte per element."""

    @property
    def total(self) -> float:
        """All of it."""
        return (
            self.stream + self.norms + self.qkv + self.core + self.attended + self.mlp + self.masks
        )


def element_bytes(precision: PrecisionConfig) -> int:
    """Bytes of a parameter and of an activation."""
    return 4 if precision.name == "fp32" else 2


def uses_flash(model: ModelConfig, precision: PrecisionConfig, *, on_gpu: bool) -> bool:
    """Whether attention runs without keeping its scores, as kernels/table.py chooses."""
    if precision.attention_backend in ("unfused", "local") or not precision.masked_softmax_fusion:
        return False
    if model.apply_query_key_layer_scaling:
        return False
    return on_gpu or model.attention_dropout == 0.0


def block_items(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    micro_batch_size: int,
    on_gpu: bool = True,
) -> Items:
    """What one block keeps for a micro batch, nothing recomputed."""
    w, tp = element_bytes(precision), parallel.tp
    tokens = model.seq_length * micro_batch_size / parallel.cp
    split = tokens / tp if parallel.sequence_parallel else tokens
    h, f = model.hidden_size, model.ffn_size / tp
    queries = model.num_attention_heads * model.head_size / tp
    keys = model.num_kv_heads * model.head_size / tp
    heads = model.num_attention_heads / tp
    rotated = model.position_embedding_type == "rope"
    # rotated q and k are tensors of their own beside the fused q|k|v that v is a view of
    qkv = tokens * w * ((queries + 2 * keys) + (queries + keys if rotated else 0.0))
    attended = tokens * w * queries
    if uses_flash(model, precision, on_gpu=on_gpu):
        core = tokens * heads * 4.0  # log of the sum, fp32
        if micro_batch_size > 1:
            core += tokens * w * queries  # the kernel's own output beside its copy in [s, b, h]
    else:
        square = tokens * model.seq_length * heads
        softmax = 4.0 if model.attention_softmax_in_fp32 else w
        dropout = 1.0 + w if model.attention_dropout > 0.0 else 0.0
        # softmax's output, its 16-bit copy, the dropout mask, and after dropout; queries scaled
        copy = float(w) if softmax != w else 0.0
        core = square * (softmax + (dropout or 0.0) + (0.0 if dropout else copy))
        core += tokens * w * queries * 2
    gated = 4.0 if model.swiglu else 2.0
    rms = model.normalization == "RMSNorm"
    return Items(
        stream=0.0 if rms else 2 * split * w * h,
        norms=2 * split * h * (w + (8.0 if rms else 0.0)),
        qkv=qkv,
        core=core,
        attended=attended,
        mlp=tokens * w * gated * f,
        masks=2 * split * h if model.hidden_dropout > 0.0 else 0.0,
    )


def postponed_bytes(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    micro_batch_size: int,
) -> float:
    """What one block keeps for a micro batch between I and W: both factors of its weight gradients.

    Inputs and output gradients of the four linear layers; what a column-parallel layer gathers and a
    row-parallel one reduces is kept as it is split (layers/gradients.py).  Recomputing saves nothing
    of it.
    """
    tp, h, f = parallel.tp, model.hidden_size, model.ffn_size / parallel.tp
    tokens = model.seq_length * micro_batch_size / parallel.cp
    split = tokens / tp if parallel.sequence_parallel else tokens
    queries = model.num_attention_heads * model.head_size / tp
    keys = model.num_kv_heads * model.head_size / tp
    up = f * (2 if model.swiglu else 1)
    whole = (queries + 2 * keys) + queries + up + f
    return element_bytes(precision) * (split * 4 * h + tokens * whole)


def stage_bytes(
    num_layers: int,
    items: Items,
    parallel: ParallelConfig,
    *,
    layer_input: float,
) -> tuple[float, float]:
    """(kept per micro batch by so many layers, the transient of recomputing), in bytes.

    layer_input: bytes of the residual stream between two layers.
    """
    granularity = parallel.recompute_granularity
    if granularity is None:
        return num_layers * items.total, 0.0
    if granularity == "selective":
        kept, again = items.total, 0.0
        if "core_attn" in parallel.recompute_modules:
            kept, again = kept - items.core, again + items.core
        if "mlp" in parallel.recompute_modules:
            kept, again = kept - items.mlp, max(again, items.mlp)
        return num_layers * kept, again
    count = parallel.recompute_num_layers or 1
    split = parallel.tp if parallel.distribute_saved_activations else 1
    if parallel.recompute_method == "block":
        again = min(count, num_layers)
        return (
            again * layer_input / split + (num_layers - again) * items.total,
            items.total if again else 0.0,
        )
    groups = -(-num_layers // count)
    return groups * layer_input / split, min(count, num_layers) * items.total
