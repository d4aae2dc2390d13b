"""The one table of named layouts; tests/parity/compare.py trains and compares them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.support import axes


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences from the serial run; see compare.py for how they are measured."""

    loss: float = 1e-5
    grad_norm: float = 1e-5
    gradients: float = 1e-5
    parameters: float = 1e-5


EXACT = Tolerance()
HALF = Tolerance(loss=5e-3, grad_norm=5e-2, gradients=5e-2, parameters=3e-2)
"""fp16 and bf16: another order of sums rounds to 3 or 2 digits; the sizes of the effect, not of a bug."""


@dataclass(frozen=True)
class Layout:
    """A name, its world size, what it changes against the serial run, and what both share."""

    name: str
    ranks: int = 1
    changes: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    tolerance: Tolerance = EXACT


def layout(
    name: str,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    shared: dict[str, Any] | None = None,
    tolerance: Tolerance = EXACT,
    **changes: Any,
) -> Layout:
    """A layout of tp x pp x dp ranks."""
    sizes = {
        axes.TP: tp,
        axes.PP: pp,
    }
    return Layout(name, tp * pp * dp, sizes | changes, shared or {}, tolerance)


def recompute(
    granularity: str,
    method: str | None = None,
    layers: int | None = None,
    *,
    split: bool = False,
    modules: list[str] | None = None,
) -> dict[str, Any]:
    """The recompute flags."""
    flags: dict[str, Any] = {
        "parallel__recompute_granularity": granularity,
        "parallel__recompute_method": method,
        "parallel__recompute_num_layers": layers,
        "parallel__distribute_saved_activations": split,
    }
    return flags | ({"parallel__recompute_modules": modules} if modules else {})


SP = {axes.SP: True}
ZERO = {axes.ZERO: 1}
OVERLAP_GATHER = {"parallel__overlap_param_gather": True}
EVERY_LAYER = recompute("full", "uniform", 1)
SELECTIVE = recompute("selective", modules=["core_attn", "mlp", "layernorm"])
DROP_ATTENTION = {"model__attention_dropout": 0.1, "precision__attention_backend": "local"}
CHUNKS2 = {axes.CHUNKS: 2}
GPIPE, ZB_H1, ZB_V = ({axes.SCHEDULE: name} for name in ("gpipe", "zb-h1", "zb-v"))
LAYERS6, LAYERS8, LAYERS16 = ({"model__num_layers": n} for n in (6, 8, 16))
HEADS8 = {"model__num_attention_heads": 8}
BATCH16 = {"train__global_batch_size": 16}
SMALL_BUCKETS = {"parallel__ddp_bucket_size": 1000}
UNTIED = {axes.UNTIED: True}
ROPE = {"model__position_embedding_type": "rope", "model__add_bias_linear": False}
GALORE = {
    "optim__optimizer": "galore", "optim__galore_rank": 4, "optim__galore_update_proj_gap": 2,
}  # fmt: skip
MUON = {"optim__optimizer": "muon", "optim__muon_fp32_matmul_prec": "highest"}
FP16 = {"precision__fp16": True, "precision__initial_loss_scale": 1024.0, "model__num_layers": 2}
BF16 = {axes.BF16: True}
ADAFACTOR = {
    "optim__optimizer": "adafactor", "optim__adafactor_scale_parameter": True,
    "optim__adafactor_beta1": 0.9,
}  # fmt: skip
ADAM8BIT = {"optim__optimizer": "adam8bit", "optim__adam8bit_block_size": 16}
LLAMA = {
    "model__normalization": "RMSNorm", "model__swiglu": True, "model__group_query_attention": True,
    "model__num_query_groups": 2,
} | ROPE | UNTIED  # fmt: skip

QUICK = [
    layout("tp2-sp", tp=2, **SP),
    layout("pp2", pp=2),
    layout("pp4", pp=4),
    layout("dp4", dp=4),
    # micro batches x their size; the serial run has 4x2
    layout("micro-1x8", train__micro_batch_size=8),
    layout("micro-8x1", train__micro_batch_size=1),
    # the last rank holds nothing but padding of the vocabulary
    layout("tp4-padding-rank", tp=4, shared={"model__vocab_size": 17}),
    layout(
        "tp2-dp2-sp-zero-padding-rank", tp=2, dp=2, shared={"model__vocab_size": 8}, **SP, **ZERO
    ),
    layout("tp2-sp-adafactor-padding", tp=2, shared=ADAFACTOR | {"model__vocab_size": 8}, **SP),
    layout("tp2-attention-dropout", tp=2, shared=DROP_ATTENTION),
    layout("dp2-no-overlap", dp=2, parallel__overlap_grad_reduce=False),
    layout("dp2-small-buckets", dp=2, parallel__ddp_bucket_size=1000),
    layout("dp4-zero-small-buckets", dp=4, parallel__ddp_bucket_size=3000, **ZERO),
    layout("dp2-zero-overlap", dp=2, **ZERO, **OVERLAP_GATHER),
    layout("tp2-pp2-dp2-sp-zero-overlap", tp=2, pp=2, dp=2, **SP, **ZERO, **OVERLAP_GATHER),
    layout("dp4-zero-bf16", dp=4, shared=BF16, tolerance=HALF, **ZERO, **OVERLAP_GATHER),
    layout("tp2-dp2-sp-zero-muon", tp=2, dp=2, shared=MUON, **SP, **ZERO),
    layout("pp4-gpipe", pp=4, **GPIPE),
    layout("pp4-interleaved", pp=4, shared=LAYERS8, **CHUNKS2),
    layout("pp4-zb-h1", pp=4, **ZB_H1),
    layout("pp4-zb-v", pp=4, shared=LAYERS8, **ZB_V),
    layout("pp2-zb-v-untied", pp=2, shared=UNTIED | ROPE, **ZB_V),
    layout("tp2-pp2-sp-zb-v", tp=2, pp=2, **SP, **ZB_V),
    layout("pp2-dp2-zb-h1-zero", pp=2, dp=2, **ZB_H1, **ZERO),
    layout("pp2-dp2-interleaved-zero", pp=2, dp=2, **CHUNKS2, **ZERO, **OVERLAP_GATHER),
    layout("pp2-uneven", pp=2, parallel__decoder_first_pipeline_num_layers=1),
    layout("pp3-head-alone", pp=3, parallel__pipeline_model_parallel_layout="Ettt|t|L"),
    layout("pp2-zb-v-layout", pp=2, parallel__pipeline_model_parallel_layout="Ett|t|t|L", **ZB_V),
    layout("pp2-dp2-zb-v-fp16", pp=2, dp=2, shared=FP16 | LAYERS8, tolerance=HALF, **ZB_V),
    layout("recompute-uniform-2", **recompute("full", "uniform", 2)),
    layout("pp2-recompute-block-1", pp=2, **recompute("full", "block", 1)),
    layout("tp2-recompute-distributed", tp=2, **recompute("full", "uniform", 1, split=True)),
    layout(
        "dp2-zero-recompute-selective",
        dp=2,
        shared=DROP_ATTENTION,
        **ZERO,
        **SELECTIVE,
    ),
    layout("dp2-fp16", dp=2, shared=FP16, tolerance=HALF),
    layout("pp2-dp2-bf16", pp=2, dp=2, shared=BF16, tolerance=HALF),
    # a split backward with recomputation: I computes again, W keeps what came of it
    layout(
        "tp2-pp2-sp-zb-v-recompute", tp=2, pp=2, **SP, **ZB_V, **recompute("full", "uniform", 1)
    ),
]
"""Every kind once, with the fewest ranks: `make test` and `make parity`."""

MORE = [
    layout("tp2-pp2-dp2-sp-zero-galore", tp=2, pp=2, dp=2, shared=GALORE, **SP, **ZERO),
    layout("tp4-muon", tp=4, shared=MUON | {"model__vocab_size": 17}),
    layout(
        "tp2-pp2-dp2-sp-zero-overlap-muon-llama",
        tp=2,
        pp=2,
        dp=2,
        shared=MUON | LLAMA,
        **SP,
        **ZERO,
        **OVERLAP_GATHER,
    ),
    layout("tp2-pp2-muon-fp16", tp=2, pp=2, shared=MUON | FP16, tolerance=HALF),
    layout("tp2", tp=2),
    layout("tp4", tp=4),
    layout("dp2", dp=2),
    layout("tp2-pp2", tp=2, pp=2),
    layout("tp2-dp2", tp=2, dp=2),
    layout("pp2-dp2", pp=2, dp=2),
    layout("tp2-pp2-dp2", tp=2, pp=2, dp=2),
    layout("tp2-pp2-dp2-sp", tp=2, pp=2, dp=2, **SP),
    layout("micro-2x4", train__micro_batch_size=4),
    # the serial run has four micro batches of two itself, so this row is held against one of eight
    layout("micro-4x2", shared={"train__micro_batch_size": 8}, train__micro_batch_size=2),
    layout("pp2-dp2-attention-dropout", pp=2, dp=2, shared=DROP_ATTENTION),
    layout("dp2-zero", dp=2, **ZERO),
    layout("pp2-interleaved", pp=2, **CHUNKS2),
    layout("tp2-pp2-sp-interleaved", tp=2, pp=2, **SP, **CHUNKS2),
    layout("pp2-dp2-interleaved", pp=2, dp=2, **CHUNKS2),
    layout("pp2-zb-h1", pp=2, **ZB_H1),
    layout("tp2-pp2-sp-zb-h1", tp=2, pp=2, **SP, **ZB_H1),
    layout("pp2-dp2-zb-h1", pp=2, dp=2, **ZB_H1),
    layout("pp2-zb-v", pp=2, **ZB_V),
    layout("pp2-dp2-zb-v-small-buckets", pp=2, dp=2, parallel__ddp_bucket_size=1000, **ZB_V),
    layout("tp2-pp2-dp2-sp-zb-v", tp=2, pp=2, dp=2, **SP, **ZB_V),
    layout("pp2-dp2-zb-v-zero", pp=2, dp=2, **ZB_V, **ZERO, **OVERLAP_GATHER),
    layout(
        "pp4-ends-counted",
        pp=4,
        shared=LAYERS6,
        parallel__account_for_embedding_in_pipeline_split=True,
        parallel__account_for_loss_in_pipeline_split=True,
    ),
    layout("tp2-pp2-dp2-sp-zero-adafactor", tp=2, pp=2, dp=2, shared=ADAFACTOR, **SP, **ZERO),
    layout("tp2-pp2-sp-adam8bit", tp=2, pp=2, shared=ADAM8BIT, **SP),
    layout("tp2-pp2-zb-v-bf16", tp=2, pp=2, shared=BF16, tolerance=HALF, **ZB_V),
    layout("tp2-pp2-sp-recompute", tp=2, pp=2, **SP, **EVERY_LAYER),
    layout("tp2-pp2-fp16", tp=2, pp=2, shared=FP16, tolerance=HALF),
    layout("tp2-pp2-bf16", tp=2, pp=2, shared=BF16, tolerance=HALF),
    layout("pp2-zb-h1-recompute-uniform-2", pp=2, **ZB_H1, **recompute("full", "uniform", 2)),
    layout(
        "pp2-dp2-zb-v-zero-recompute-block",
        pp=2,
        dp=2,
        **ZB_V,
        **ZERO,
        **recompute("full", "block", 1),
    ),
    layout(
        "tp2-pp2-zb-h1-recompute-distributed",
        tp=2,
        pp=2,
        **ZB_H1,
        **recompute("full", "uniform", 1, split=True),
    ),
    layout(
        "tp2-pp2-sp-zb-h1-recompute-selective",
        tp=2,
        pp=2,
        shared=DROP_ATTENTION,
        **SP,
        **ZB_H1,
        **recompute("selective", modules=["core_attn", "mlp", "layernorm"]),
    ),
    layout(
        "pp2-dp2-zb-v-fp16-recompute",
        pp=2,
        dp=2,
        shared=FP16 | LAYERS8,
        tolerance=HALF,
        **ZB_V,
        **recompute("full", "uniform", 1),
    ),
]
"""The kinds in other company: `make test-ci`."""

WIDE = [
    # tensor parallel as far as eight ranks go
    layout("tp8", tp=8, shared=HEADS8),
    layout("tp8-sp", tp=8, shared=HEADS8, **SP),
    layout("tp8-sp-recompute-selective", tp=8, shared=HEADS8 | DROP_ATTENTION, **SP, **SELECTIVE),
    layout("tp8-sp-bf16", tp=8, shared=HEADS8 | BF16, tolerance=HALF, **SP),
    layout("tp4-sp", tp=4, **SP),
    layout("tp4-fp16", tp=4, shared=FP16, tolerance=HALF),
    layout("tp4-dp2", tp=4, dp=2),
    layout("tp4-dp2-sp-zero-overlap", tp=4, dp=2, **SP, **ZERO, **OVERLAP_GATHER),
    layout("tp4-dp2-sp-zero-bf16", tp=4, dp=2, shared=BF16, tolerance=HALF, **SP, **ZERO),
    layout("tp2-dp4-sp-zero-overlap", tp=2, dp=4, **SP, **ZERO, **OVERLAP_GATHER),
    layout("tp2-dp4-sp-zero-recompute", tp=2, dp=4, **SP, **ZERO, **EVERY_LAYER),
    layout("tp2-dp4-zero-fp16", tp=2, dp=4, shared=FP16, tolerance=HALF, **ZERO),
    # tensor x pipeline
    layout("tp4-pp2", tp=4, pp=2),
    layout("tp4-pp2-sp", tp=4, pp=2, **SP),
    layout("tp4-pp2-sp-interleaved", tp=4, pp=2, **SP, **CHUNKS2),
    layout("tp4-pp2-sp-zb-v-bf16", tp=4, pp=2, shared=BF16, tolerance=HALF, **SP, **ZB_V),
    layout("tp2-pp4", tp=2, pp=4),
    layout("tp2-pp4-sp-gpipe", tp=2, pp=4, **SP, **GPIPE),
    layout("tp2-pp4-sp-interleaved", tp=2, pp=4, shared=LAYERS8, **SP, **CHUNKS2),
    layout("tp2-pp4-sp-zb-h1", tp=2, pp=4, **SP, **ZB_H1),
    layout("tp2-pp4-sp-zb-v", tp=2, pp=4, shared=LAYERS8, **SP, **ZB_V),
    layout("tp2-pp4-sp-recompute", tp=2, pp=4, **SP, **EVERY_LAYER),
    layout("tp2-pp4-sp-bf16", tp=2, pp=4, shared=BF16, tolerance=HALF, **SP),
    layout("tp2-pp2-sp-llama", tp=2, pp=2, shared=LLAMA, **SP),
    layout("tp2-pp4-sp-zb-v-llama", tp=2, pp=4, shared=LLAMA | LAYERS8, **SP, **ZB_V),
    # pipeline x data; sixteen samples, so that four ranks see more than a warm-up
    layout("pp4-dp2", pp=4, dp=2, shared=BATCH16),
    layout("pp4-dp2-zero", pp=4, dp=2, shared=BATCH16, **ZERO),
    layout("pp4-dp2-gpipe-zero", pp=4, dp=2, shared=BATCH16, **GPIPE, **ZERO),
    layout(
        "pp4-dp2-interleaved-zero-overlap",
        pp=4,
        dp=2,
        shared=BATCH16 | LAYERS8,
        **CHUNKS2,
        **ZERO,
        **OVERLAP_GATHER,
    ),
    layout("pp4-dp2-zb-h1-zero", pp=4, dp=2, shared=BATCH16, **ZB_H1, **ZERO),
    layout(
        "pp4-dp2-zb-v-zero-overlap",
        pp=4,
        dp=2,
        shared=BATCH16 | LAYERS8,
        **ZB_V,
        **ZERO,
        **OVERLAP_GATHER,
    ),
    layout(
        "pp4-dp2-zb-v-zero-bf16",
        pp=4,
        dp=2,
        shared=BATCH16 | LAYERS8 | BF16,
        tolerance=HALF,
        **ZB_V,
        **ZERO,
    ),
    layout("dp4-pp2", pp=2, dp=4, shared=BATCH16),
    layout("dp4-pp2-gpipe-recompute", pp=2, dp=4, shared=BATCH16, **GPIPE, **EVERY_LAYER),
    layout(
        "dp4-pp2-interleaved-zero-overlap",
        pp=2,
        dp=4,
        shared=BATCH16,
        **CHUNKS2,
        **ZERO,
        **OVERLAP_GATHER,
    ),
    layout(
        "dp4-pp2-zb-h1-zero-fp16",
        pp=2,
        dp=4,
        shared=BATCH16 | FP16,
        tolerance=HALF,
        **ZB_H1,
        **ZERO,
    ),
    layout(
        "dp4-pp2-zb-v-zero-small-buckets",
        pp=2,
        dp=4,
        shared=BATCH16,
        **ZB_V,
        **ZERO,
        **SMALL_BUCKETS,
    ),
    # all three, with everything switched on
    layout("tp2-pp2-dp2-sp-gpipe-zero", tp=2, pp=2, dp=2, **SP, **GPIPE, **ZERO),
    layout(
        "tp2-pp2-dp2-recompute-distributed",
        tp=2,
        pp=2,
        dp=2,
        **recompute("full", "uniform", 1, split=True),
    ),
    layout(
        "tp2-pp2-dp2-sp-zero-recompute-selective",
        tp=2,
        pp=2,
        dp=2,
        shared=DROP_ATTENTION,
        **SP,
        **ZERO,
        **OVERLAP_GATHER,
        **SELECTIVE,
    ),
    layout(
        "tp2-pp2-dp2-sp-interleaved-zero-recompute",
        tp=2,
        pp=2,
        dp=2,
        **SP,
        **CHUNKS2,
        **ZERO,
        **OVERLAP_GATHER,
        **EVERY_LAYER,
    ),
    layout(
        "tp2-pp2-dp2-sp-zb-h1-zero-recompute",
        tp=2,
        pp=2,
        dp=2,
        **SP,
        **ZB_H1,
        **ZERO,
        **OVERLAP_GATHER,
        **EVERY_LAYER,
    ),
    layout(
        "tp2-pp2-dp2-sp-zb-v-zero-recompute",
        tp=2,
        pp=2,
        dp=2,
        **SP,
        **ZB_V,
        **ZERO,
        **OVERLAP_GATHER,
        **EVERY_LAYER,
    ),
    layout(
        "tp2-pp2-dp2-sp-zb-v-zero-recompute-bf16",
        tp=2,
        pp=2,
        dp=2,
        shared=BF16,
        tolerance=HALF,
        **SP,
        **ZB_V,
        **ZERO,
        **OVERLAP_GATHER,
        **EVERY_LAYER,
    ),
    layout("tp2-pp2-dp2-sp-zero-fp16", tp=2, pp=2, dp=2, shared=FP16, tolerance=HALF, **SP, **ZERO),
    layout("tp2-pp2-dp2-ranks-tp-pp-dp", tp=2, pp=2, dp=2, parallel__use_tp_pp_dp_mapping=True),
    layout(
        "tp2-pp2-dp2-autograd-sums", tp=2, pp=2, dp=2, precision__gradient_accumulation_fusion=False
    ),
    # one kind alone on eight ranks
    layout("dp8", dp=8, shared=BATCH16),
    layout("dp8-zero-overlap", dp=8, shared=BATCH16, **ZERO, **OVERLAP_GATHER, **SMALL_BUCKETS),
    layout("pp8", pp=8, shared=LAYERS8),
    layout("pp8-interleaved", pp=8, shared=LAYERS16 | BATCH16, **CHUNKS2),
    layout("pp8-zb-h1", pp=8, shared=LAYERS8, **ZB_H1),
    layout("pp8-zb-v", pp=8, shared=LAYERS16, **ZB_V),
]
"""Products of kinds on up to eight ranks: `make parity-all` and `make nightly`."""

LION = {"optim__optimizer": "lion"}
SOPHIA = {"optim__optimizer": "sophiag", "optim__sophia_hessian_interval": 2}
LISA = {"optim__lisa_layers": 2, "optim__lisa_interval": 2}
GROUPED = {"optim__param_groups": ("embedding.*:lr=0.3", "*.k.*:lr=0", "blocks.1.*:rule=sgd")}
SFT = {
    "train__objective": "sft", "data__mock_data": False, "data__data_path": ("answers",),
}  # fmt: skip

RULES = [
    layout("tp2-pp2-dp2-sp-zero-lion", tp=2, pp=2, dp=2, shared=LION, **SP, **ZERO),
    layout("tp2-pp2-dp2-sp-zero-sophiag", tp=2, pp=2, dp=2, shared=SOPHIA, **SP, **ZERO),
    layout("pp2-dp2-zb-v-sophiag-sft", pp=2, dp=2, shared=SOPHIA | SFT, **ZB_V),
    layout("tp2-pp2-interleaved-sophiag", tp=2, pp=2, shared=SOPHIA | UNTIED, **CHUNKS2),
    layout("tp4-sophiag-padding-rank", tp=4, shared=SOPHIA | {"model__vocab_size": 17}),
    layout("micro-8x1-sophiag", shared=SOPHIA, train__micro_batch_size=1),
    layout("pp2-dp2-zb-h1-sophiag-bf16", pp=2, dp=2, shared=SOPHIA | BF16, tolerance=HALF, **ZB_H1),
    layout("tp2-dp2-zero-sophiag-fp16", tp=2, dp=2, shared=SOPHIA | FP16, tolerance=HALF, **ZERO),
    layout("tp2-pp2-dp2-sp-zero-lisa", tp=2, pp=2, dp=2, shared=LISA, **SP, **ZERO),
    layout("pp2-dp2-zb-v-lisa", pp=2, dp=2, shared=LISA, **ZB_V),
    layout("tp2-pp2-dp2-sp-zero-param-groups", tp=2, pp=2, dp=2, shared=GROUPED, **SP, **ZERO),
]  # fmt: skip
"""Update rules in place of Adam: `make parity-all` and `make nightly`."""

LAYOUTS = [*QUICK, *MORE, *WIDE, *RULES]

TRANSLATED = (
    "tp2-sp", "pp4-zb-h1", "tp2-pp2-sp-zb-v-recompute", "tp2-pp2-sp-llama",
    "dp2-zero-recompute-selective", "pp2-dp2-bf16",
)  # fmt: skip
"""Compiled down to C++, which takes a minute each; traced and differentiated as graphs are all quick ones."""

WRONG = [
    layout("a lost micro batch", train__global_batch_size=6),
    layout("another seed", train__seed=7),
    layout("another dropout rate", model__hidden_dropout=0.2),
]
"""Not equal to the serial run, so that the comparison is seen to fail."""
