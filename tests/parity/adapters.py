"""Layouts in which adapters are trained: what is frozen, what is cut, what is summed."""

from __future__ import annotations

from typing import Any

from tests.parity.kinds import (
    BF16,
    EVERY_LAYER,
    FP16,
    HALF,
    LLAMA,
    OVERLAP_GATHER,
    SELECTIVE,
    SP,
    ZB_H1,
    ZERO,
    Layout,
    layout,
)

BESIDE: dict[str, Any] = {
    "lora__lora_rank": 3, "lora__lora_alpha": 6.0, "checkpoint__load": "a base", "checkpoint__finetune": True,
}  # fmt: skip
LORA: dict[str, Any] = LLAMA | BESIDE
DORA = LORA | {"lora__lora_variant": "dora"}
DROPPED = LORA | {"lora__lora_dropout": 0.2}
ALL = LORA | {"lora__lora_targets": ("all",)}
SOME = LORA | {"lora__lora_targets": ("q_proj", "v_proj", "down_proj")}
TABLE = LORA | {"lora__lora_targets": ("embedding",), "lora__lora_variant": "rslora"}
NF4 = LORA | {
    "lora__lora_base": "nf4", "model__hidden_size": 128, "model__ffn_hidden_size": 128,
}  # fmt: skip
"""Blocks of 64 numbers that tp 2 does not cut."""

QUICK: list[Layout] = [
    layout("tp2-sp-lora-dropout", tp=2, shared=DROPPED, **SP),
    layout("pp2-lora-all", pp=2, shared=ALL),
]
MORE: list[Layout] = [
    layout("tp2-pp2-sp-recompute-dora", tp=2, pp=2, shared=DORA, **SP, **EVERY_LAYER),
    layout("dp2-lora-zero-overlap", dp=2, shared=ALL, **ZERO, **OVERLAP_GATHER),
    layout("tp2-lora-all", tp=2, shared=ALL),
]
WIDE: list[Layout] = [
    layout("tp2-pp2-lora", tp=2, pp=2, shared=LORA),
    layout("dp2-lora", dp=2, shared=LORA),
    layout("tp2-sp-lora-all", tp=2, shared=ALL, **SP),
    layout("tp2-lora-some", tp=2, shared=SOME),
    layout("tp2-dora", tp=2, shared=DORA),
    layout("tp4-sp-lora-table", tp=4, shared=TABLE | {"model__num_query_groups": 4}, **SP),
    layout("pp2-lora-table", pp=2, shared=TABLE),
    layout("pp2-lora-zb-h1", pp=2, shared=LORA, **ZB_H1),
    layout("tp2-sp-lora-recompute-selective", tp=2, shared=DROPPED, **SP, **SELECTIVE),
    layout("tp2-dp2-dora-zero", tp=2, dp=2, shared=DORA, **ZERO),
    layout("dp2-lora-zero-bf16", dp=2, shared=LORA | BF16, tolerance=HALF, **ZERO),
    layout("tp2-dora-fp16", tp=2, shared=DORA | FP16, tolerance=HALF),
    layout("tp2-gpt2-lora", tp=2, shared=BESIDE),
    layout("tp2-pp2-sp-recompute-nf4", tp=2, pp=2, shared=NF4, **SP, **EVERY_LAYER),
    layout(
        "tp2-dp2-nf4-dora-zero", tp=2, dp=2, shared=NF4 | {"lora__lora_variant": "dora"}, **ZERO
    ),
    layout("pp2-nf4-zb-h1-bf16", pp=2, shared=NF4 | BF16, tolerance=HALF, **ZB_H1),
]
