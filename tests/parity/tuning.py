"""Layouts in which a model is tuned on answers: rows of several samples, masks that may be empty, noise."""

from __future__ import annotations

from typing import Any

from tests.parity.adapters import BESIDE
from tests.parity.kinds import (
    EVERY_LAYER,
    LLAMA,
    SP,
    ZB_V,
    ZERO,
    Layout,
    layout,
)

_ANSWERS: dict[str, Any] = {
    "train__objective": "sft", "data__mock_data": False, "data__data_path": ("answers",),
    "train__neftune_alpha": 5.0,
}  # fmt: skip
GPT2, ROTARY = _ANSWERS, LLAMA | _ANSWERS
ADAPTED = ROTARY | BESIDE
"""Adapters learn the answers, beside a frozen base."""

MORE: list[Layout] = [
    layout("tp2-pp2-sp-sft", tp=2, pp=2, shared=GPT2, **SP),
    layout("dp2-sft", dp=2, shared=GPT2),
    layout("tp2-sp-sft-lora", tp=2, shared=ADAPTED, **SP),
]
WIDE: list[Layout] = [
    layout("tp2-sft", tp=2, shared=GPT2),
    layout("tp2-pp2-dp2-sft-lora-zero", tp=2, pp=2, dp=2, shared=ADAPTED, **ZERO),
    layout("pp2-sft-dora", pp=2, shared=ADAPTED | {"lora__lora_variant": "dora"}),
    layout("pp2-sft-llama", pp=2, shared=ROTARY),
    layout("tp2-sp-sft-recompute-llama", tp=2, shared=ROTARY, **SP, **EVERY_LAYER),
    layout("tp2-pp2-sft", tp=2, pp=2, shared=GPT2),
    layout("tp2-pp2-dp2-sp-sft-zero", tp=2, pp=2, dp=2, shared=ROTARY, **SP, **ZERO),
    layout("pp2-sft-zb-v", pp=2, shared=GPT2, **ZB_V),
    layout("dp4-sft-zero", dp=4, shared=GPT2, **ZERO),
    layout("micro-8x1-sft", shared=GPT2, train__micro_batch_size=1),
    layout("micro-1x8-sft", shared=GPT2, train__micro_batch_size=8),
]
