"""Bytes a transformer block keeps between its forward and its backward, item by item.

Two counts.  `kept` is what the modules of this project save.  `korthikanti` is the formula of
arXiv:2205.05198, section 4, to compare with published figures; fp16, dropout everywhere, attention
without a fused kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_lite.blueprint.figure.parts import Activation, Core, Matrix, Norm, Parts
from megatron_lite.blueprint.recompute import RecomputePlan
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.precision import PrecisionConfig

PaperVariant = Literal["tp", "tp+sp", "tp+selective", "tp+sp+selective", "full"]
VARIANTS: tuple[PaperVariant, ...] = ("tp", "tp+sp", "tp+selective", "tp+sp+selective", "full")
"""The rows of the paper's table 2, in order."""


def korthikanti(
    model: ModelConfig, *, micro_batch_size: int, tp: int, variant: PaperVariant
) -> float:
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
    """Inputs of the two norms: the residual stream; and what attention's adapters keep."""
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
    """Inputs and outputs of the activation function, and what its matrices' adapters keep."""
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


def _dense_mask(model: ModelConfig, precision: PrecisionConfig, *, on_gpu: bool) -> bool:
    """Whether documents and windows are kept by a mask, not by borders and a number; see kernels/table.py.

    The package flash-attn, which has attention dropout with them, is not counted on.
    """
    by_borders = (
        on_gpu and precision.name != "fp32" and model.attention_dropout == 0.0
        and model.head_size % 8 == 0 and model.head_size <= 256
    )  # fmt: skip
    return not by_borders or not uses_flash(model, precision, on_gpu=on_gpu)


def block_items(
    layer: Parts,
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    micro_batch_size: int,
    on_gpu: bool = True,
    segments: bool = False,
) -> Items:
    """What one block keeps for a micro batch, nothing recomputed, and what its backward adds.

    Compiled pieces keep less: no mask, no half way of a gate, and of a norm its input.
    segments: whether documents do not see one another; their mask itself is shared_mask_bytes().
    """
    w, tp = element_bytes(precision), parallel.tp
    tokens = model.seq_length * micro_batch_size / parallel.cp
    split = tokens / tp if parallel.splits_sequence else tokens
    h = model.hidden_size
    norms = [norm for norm in layer.of(Norm) if not norm.heads]
    of_heads = [norm for norm in layer.of(Norm) if norm.heads]
    cores, acts = layer.of(Core), layer.of(Activation)
    compiled = precision.compiles(on_gpu=on_gpu)
    kept_of_act = [act.inputs + act.width if compiled else act.kept for act in acts]
    made_of_act = [act.inputs if compiled else act.gradients for act in acts]
    mlp = sum(tokens * w * kept / tp for kept in kept_of_act)
    qkv = _qkv_bytes(cores, tp, tokens * w, normed=bool(of_heads))
    core, core_gradients = 0.0, 0.0
    for one in cores:
        kept, gradients = _core(
            one, model, parallel, precision, micro_batch_size=micro_batch_size, on_gpu=on_gpu,
            segments=segments, qkv=qkv / len(cores), normed=bool(of_heads),
        )  # fmt: skip
        core, core_gradients = core + kept, max(core_gradients, gradients)
    gathered = 2 * tokens * w * h + (2 * split * w * h if parallel.splits_sequence else 0.0)
    in_fp32 = [norm for norm in norms if norm.function == "RMSNorm" and not compiled]
    masked = model.hidden_dropout > 0.0 and not compiled
    dropped = [matrix for matrix in layer.of(Matrix) if matrix.into_stream and masked]
    beside = {"mlp": 0.0, "attention": 0.0}
    for matrix in layer.of(Matrix):
        where = "mlp" if matrix.name.startswith("mlp.") else "attention"
        beside[where] += _beside(matrix, parallel, tokens, w)
    mlp += beside["mlp"]
    return Items(
        stream=sum(
            split * w * norm.width for norm in norms if norm not in in_fp32 and not norm.beside
        )
        + beside["attention"],
        norms=sum(split * w * norm.width for norm in norms),
        inner=sum(split * norm.width * 8.0 for norm in in_fp32)
        + sum(tokens / tp * _inner_of_heads(norm, w) for norm in of_heads if not compiled),
        qkv=qkv,
        core=core,
        attended=sum(tokens * w * one.queries / tp for one in cores),
        mlp=mlp,
        masks=sum(split * matrix.rows for matrix in dropped),
        mlp_gradients=max((tokens * w * made / tp for made in made_of_act), default=0.0),
        core_gradients=core_gradients - mlp - split * w * h,
        gathered=gathered,
    )


def _beside(matrix: Matrix, parallel: ParallelConfig, tokens: float, width: int) -> float:
    """What an adapter keeps: A x of each piece, with dropout what A is given, and the mask; to train
    lengths W x and B A x, of which they are factors."""
    adapter = matrix.adapter
    if adapter is None:
        return 0.0
    split = tokens / parallel.tp if parallel.splits_sequence else tokens
    given, ranks = (split, tokens) if matrix.cut == "rows" else (tokens, split)
    inputs, outputs = matrix.local(parallel.tp)
    dropped = given * inputs * (width + 1) if adapter.dropout else 0.0
    made = tokens if matrix.cut == "rows" else split
    scaled = made * outputs * width * 2 if adapter.magnitude else 0.0
    return dropped + scaled + ranks * width * adapter.rank * len(adapter.pieces)


def _inner_of_heads(norm: Norm, width: int) -> float:
    """Bytes per token that a norm of queries or keys keeps; its input in fp32 is the fused q|k|v itself."""
    kept = 0.0 if norm.function == "LayerNorm" else 4.0 if width == 4 else 8.0
    return kept * norm.heads * norm.width


def _qkv_bytes(cores: Sequence[Core], tp: int, bytes_per_feature: float, *, normed: bool) -> float:
    """q, k and v as attention keeps them."""
    qkv = 0.0
    for core in cores:
        queries, keys = core.queries / tp, core.keys / tp
        qkv += bytes_per_feature * (queries + 2 * keys)
        if core.rotated or normed:
            # rotated q and k are tensors of their own beside the fused q|k|v that v is a view of
            qkv += bytes_per_feature * (queries + keys)
    return qkv


def rotary_bytes(layers: Iterable[Parts], model: ModelConfig) -> float:
    """The tables of cosines and sines that the layers of a stage share, fp32."""
    channels = {core.rotated for layer in layers for core in layer.of(Core)}
    return 4.0 * model.seq_length * sum(channels)


def deferred_wgrad_bytes(
    layer: Parts,
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    micro_batch_size: int,
) -> float:
    """What one block keeps for a micro batch between I and W: both operands of its deferred wgrads.

    Inputs and output gradients of its matrices; what a column-parallel one gathers and a
    row-parallel one reduces is kept as it is split (layers/gradients.py).  Recomputing saves nothing
    of it.
    """
    tokens = model.seq_length * micro_batch_size / parallel.cp
    split = tokens / parallel.tp if parallel.splits_sequence else tokens
    elements = 0.0
    for matrix in layer.of(Matrix):
        inputs, outputs = matrix.local(parallel.tp)
        x, dy = (split, tokens) if matrix.cut == "rows" else (tokens, split)
        elements += 0 if matrix.frozen else x * inputs + dy * outputs
        if (
            matrix.adapter is not None
        ):  # the products of A; those of B are made at once, or as small
            elements += x * inputs + dy * matrix.adapter.rank * len(matrix.adapter.pieces)
    return element_bytes(precision) * elements


def _core(
    core: Core,
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    micro_batch_size: int,
    on_gpu: bool,
    segments: bool,
    qkv: float,
    normed: bool,
) -> tuple[float, float]:
    """(kept beside q, k and v, added by backward) of attention; qkv: bytes of q, k and v."""
    w = element_bytes(precision)
    tokens = model.seq_length * micro_batch_size / parallel.cp
    heads, queries = core.heads / parallel.tp, core.queries / parallel.tp
    gradients = 2 * qkv
    if uses_flash(model, precision, on_gpu=on_gpu):
        # log of the sum, fp32; torch's own copy of a mask, which it adds to the scores
        masked = (segments or core.window is not None) and _dense_mask(
            model, precision, on_gpu=on_gpu
        )
        masks = (
            1 if core.group is None else 2
        )  # of the heads whose groups are moved, and the others
        bias = masks * tokens * model.seq_length * w if masked else 0.0
        turned = bool(core.rotated or normed)
        more = 0.0 if core.group is None else tokens * w * queries  # groups' outputs
        if core.group is not None and not segments:
            more += w * _grouped(core, tokens, parallel.tp, micro_batch_size, turned=turned)
        return tokens * heads * 4.0 + bias + more, gradients
    square = tokens * core.pairs(model.seq_length) / model.seq_length * heads
    wide = 4.0 if model.attention_softmax_in_fp32 else float(w)
    # softmax's output; its 16-bit copy, or the dropout mask and what is left after it; who may look
    looks = model.seq_length**2 if core.group is None else 2.25 * core.group**2
    kept = square * wide + (0.0 if segments else looks)
    if model.attention_dropout > 0.0:
        kept += square * (1.0 + w)
    elif wide != w:
        kept += square * w
    # products want [b n, s, d]: views of the fused tensor are copied where there are several samples
    if micro_batch_size > 1 or core.kv_heads < core.heads or core.group is not None:
        kept += tokens * w * 3 * queries - qkv
    elif not core.rotated:  # the scaled q; a rotated one it takes the place of
        kept += tokens * w * queries
    return kept, square * (wide + max(wide, float(w))) + gradients


def _grouped(core: Core, tokens: float, tp: int, samples: int, *, turned: bool) -> float:
    """Elements of q, k and v that a fused kernel keeps on top of these, or less, where groups are its rows."""
    queries, keys = core.queries / tp, core.keys / tp
    if samples == 1:  # groups are views; of moved heads both ends are copied
        return (core.group or 0) * (queries + 2 * keys) / 2
    # groups are copies, and what they were cut from is free
    return -tokens * (queries + keys) if turned else 0.0


def shared_mask_bytes(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    micro_batch_size: int,
    on_gpu: bool = True,
) -> float:
    """The mask of a micro batch's documents, a byte per pair of tokens, where backward needs it.

    Kernels that take their borders make none.  The layers that run together share it
    (kernels/segments.py); a fused kernel keeps its own copy.
    """
    if not _dense_mask(model, precision, on_gpu=on_gpu):
        return 0.0
    again = "core_attn" in RecomputePlan.from_config(parallel).modules
    if uses_flash(model, precision, on_gpu=on_gpu) and not again:
        return 0.0
    masks = 1 if model.group_size is None else 2
    return float(masks * model.seq_length**2 * micro_batch_size) / parallel.cp


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
    layers: Sequence[Items],
    parallel: ParallelConfig,
    *,
    layer_input: float,
    shared: float = 0.0,
    tables: float = 0.0,
) -> StageBytes:
    """What the layers of a stage hold; layer_input: bytes of the stream between two of them.

    shared: what those that run together keep once; tables: what all keep once, recomputed or not.
    """
    if not layers:  # the embedding or the loss alone
        return StageBytes(0.0, 0.0, 0.0)
    plan = RecomputePlan.from_config(parallel)
    if not plan.group:
        found = _with_parts_again(layers, plan, layer_input)
        return replace(found, kept=found.kept + shared + tables)
    split = parallel.tp if plan.split else 1
    kept, again = tables, 0.0
    groups = plan.groups(len(layers))
    for positions, recomputed in groups:
        items = [layers[position] for position in positions]
        whole = sum(item.total for item in items)
        kept += layer_input / split if recomputed else whole
        if recomputed:
            # the kept input is the first block's stream, unless every rank keeps a slice of it
            stream = layer_input if plan.layers is None and split == 1 and items[0].stream else 0.0
            again = max(again, whole + shared - stream)
    if not groups[-1][1]:
        # where some layers keep everything, their memory is free before the first is recomputed
        again = 0.0
        kept += shared
    return StageBytes(
        kept, again, max(max(i.mlp_gradients, i.core_gradients) + i.gathered for i in layers)
    )


def _with_parts_again(
    layers: Sequence[Items], plan: RecomputePlan, layer_input: float
) -> StageBytes:
    """All layers kept, but for the parts that --recompute-modules names."""
    kept = 0.0
    moments = []
    for items in layers:
        core = items.core if "core_attn" in plan.modules else 0.0
        mlp = items.mlp if "mlp" in plan.modules else 0.0
        kept += items.total - core - mlp
        if "layernorm" in plan.modules and items.inner:
            kept += 2 * layer_input - items.inner
        moments += [
            (mlp, items.mlp_gradients + items.gathered),
            (core, items.core_gradients + mlp + items.gathered),
        ]
    again, backward = max(moments, key=sum)
    return StageBytes(kept, again, backward)
