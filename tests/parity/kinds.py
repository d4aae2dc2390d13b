"""What a layout of the table says, and the settings that several of them share."""

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
