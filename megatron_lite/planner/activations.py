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
    """Bytes of one block and micro batch on one rank, by what they are.

    The first eight are kept from forward to backward; the others live only while the block's
    backward runs.
    """

    stream: float
    """Inputs of the two norms: the residual stream."""
    norms: float
    """Outputs of the norms, inputs of the projections."""
    inner: float
    """What the reference RMSNorm keeps in fp32 instead of its input."""
    qkv: float
    core: float
    """What attention keeps besides q, k and v: scores, or only a number per row."""
    attended: float
    """Input of the output projection."""
    mlp: float
    """Inputs and outputs of the activation function."""
    masks: float
    """Hidden dropout, a byte per element."""
    mlp_gradients: float
    """On top of what is kept while backward is in the MLP."""
    core_gradients: float
    """On top of what is kept, less the MLP's, while backward is in the attention."""
    gathered: float
    """Residual streams around a projection's backward: dy and dx, whole with sequence parallelism."""

    @property
    def total(self) -> float:
        """All that is kept."""
        return (
            self.stream + self.norms + self.inner + self.qkv + self.core + self.attended
            + self.mlp + self.masks
        )  # fmt: skip


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
    """What one block keeps for a micro batch, nothing recomputed, and what its backward adds."""
    w, tp = element_bytes(precision), parallel.tp
    tokens = model.seq_length * micro_batch_size / parallel.cp
    split = tokens / tp if parallel.sequence_parallel else tokens
    h, f = model.hidden_size, model.ffn_size / tp
    up = f * (2 if model.swiglu else 1)
    queries = model.num_attention_heads * model.head_size / tp
    keys = model.num_kv_heads * model.head_size / tp
    fused = queries + 2 * keys
    rms = model.normalization == "RMSNorm"
    qkv, tables = tokens * w * fused, 0.0
    if model.position_embedding_type == "rope":
        # rotated q and k are tensors of their own beside the fused q|k|v that v is a view of,
        # and every layer has tables of cosines and sines
        tables = 4.0 * model.seq_length * int(model.head_size * model.rotary_percent)
        qkv += tokens * w * (queries + keys)
    core, core_gradients = _core(
        model, parallel, precision, micro_batch_size=micro_batch_size, on_gpu=on_gpu, qkv=qkv
    )
    mlp = tokens * w * (up + f * (2 if model.swiglu else 1))
    gathered = 2 * tokens * w * h + (2 * split * w * h if parallel.sequence_parallel else 0.0)
    return Items(
        stream=0.0 if rms else 2 * split * w * h,
        norms=2 * split * h * w,
        inner=2 * split * h * 8.0 if rms else 0.0,
        qkv=qkv + tables,
        core=core,
        attended=tokens * w * queries,
        mlp=mlp,
        masks=2 * split * h if model.hidden_dropout > 0.0 else 0.0,
        # of gelu(x): its gradient and that of x, less the output that is free by then
        mlp_gradients=tokens * w * f * (3 if model.swiglu else 1),
        core_gradients=core_gradients - mlp - split * w * h,
        gathered=gathered,
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


def _core(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    micro_batch_size: int,
    on_gpu: bool,
    qkv: float,
) -> tuple[float, float]:
    """(kept beside q, k and v, added by backward) of attention; qkv: bytes of q, k and v."""
    w = element_bytes(precision)
    tokens = model.seq_length * micro_batch_size / parallel.cp
    heads = model.num_attention_heads / parallel.tp
    queries = heads * model.head_size
    gradients = 2 * qkv
    if uses_flash(model, precision, on_gpu=on_gpu):
        return tokens * heads * 4.0, gradients  # log of the sum, fp32
    square = tokens * model.seq_length * heads
    wide = 4.0 if model.attention_softmax_in_fp32 else float(w)
    # softmax's output; its 16-bit copy, or the dropout mask and what is left after it; who may look
    kept = square * wide + model.seq_length**2
    if model.attention_dropout > 0.0:
        kept += square * (1.0 + w)
    elif wide != w:
        kept += square * w
    # products want [b n, s, d]: views of the fused tensor are copied where there are several samples
    if micro_batch_size > 1 or model.num_kv_heads < model.num_attention_heads:
        kept += tokens * w * 3 * queries - qkv
    elif (
        model.position_embedding_type != "rope"
    ):  # the scaled q; a rotated one it takes the place of
        kept += tokens * w * queries
    return kept, square * (wide + max(wide, float(w))) + gradients


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Of one stage's blocks and a micro batch.

    kept: from forward to backward; again: recomputed at backward's worst moment; backward:
    everything else that lives only then.
    """

    kept: float
    again: float
    backward: float


def stage_bytes(
    num_layers: int, items: Items, parallel: ParallelConfig, *, layer_input: float
) -> StageBytes:
    """What so many blocks of a stage hold; layer_input: bytes of the stream between two blocks."""
    if num_layers == 0:  # the embedding or the loss alone
        return StageBytes(0.0, 0.0, 0.0)
    granularity, modules = parallel.recompute_granularity, parallel.recompute_modules
    per_layer, core, mlp = items.total, 0.0, 0.0
    if granularity == "selective":
        if "core_attn" in modules:
            per_layer, core = per_layer - items.core, items.core
        if "mlp" in modules:
            per_layer, mlp = per_layer - items.mlp, items.mlp
        if "layernorm" in modules and items.inner:
            per_layer += 2 * layer_input - items.inner
    if granularity != "full":
        moments = (
            (mlp, items.mlp_gradients + items.gathered),
            (core, items.core_gradients + mlp + items.gathered),
        )
        again, backward = max(moments, key=sum)
        return StageBytes(num_layers * per_layer, again, backward)
    count = min(parallel.recompute_num_layers or 1, num_layers)
    split = parallel.tp if parallel.distribute_saved_activations else 1
    backward = max(items.mlp_gradients, items.core_gradients) + items.gathered
    if parallel.recompute_method == "block":
        whole = num_layers - count
        # where some layers keep everything, theirs is free before the first is computed again
        again = 0.0 if whole else items.total
        kept = count * layer_input / split + whole * items.total
        return StageBytes(kept, again, backward)
    groups = -(-num_layers // count)
    # the kept input is the first block's stream, unless every rank keeps a slice of it
    shared = layer_input if split == 1 and items.stream else 0.0
    return StageBytes(
        groups * layer_input / split,
        count * items.total - shared,
        backward,
    )
