"""Layouts of ZeRO 2 and 3: the product with tp, pp, sequence parallelism and recomputation, and other kinds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.parity.kinds import (
    ADAFACTOR,
    BATCH16,
    BF16,
    CHUNKS2,
    DROP_ATTENTION,
    EVERY_LAYER,
    FP16,
    GALORE,
    GPIPE,
    HALF,
    LLAMA,
    MUON,
    SELECTIVE,
    SMALL_BUCKETS,
    SP,
    UNTIED,
    ZB_H1,
    ZB_V,
    Layout,
    layout,
    recompute,
)
from tests.support import axes

ZERO2, ZERO3 = {axes.ZERO: 2}, {axes.ZERO: 3}

QUICK_STAGES = [
    layout("dp2-zero2-small-buckets", dp=2, **ZERO2, **SMALL_BUCKETS),
    layout("dp2-zero3", dp=2, **ZERO3),
    layout("pp2-dp2-zero3-interleaved", pp=2, dp=2, **ZERO3, **CHUNKS2),
]
"""Within every kind once: `make test`."""

MORE_STAGES = [
    layout("dp4-zero2-bf16", dp=4, shared=BF16, tolerance=HALF, **ZERO2, **SMALL_BUCKETS),
    layout("dp4-zero3-bf16", dp=4, shared=BF16, tolerance=HALF, **ZERO3, **SMALL_BUCKETS),
    layout("dp2-zero3-fp16", dp=2, shared=FP16, tolerance=HALF, **ZERO3),
    layout("dp2-zero3-recompute", dp=2, **ZERO3, **EVERY_LAYER),
    layout("tp2-dp2-sp-zero3-untied", tp=2, dp=2, shared=UNTIED, **SP, **ZERO3, **SMALL_BUCKETS),
    layout("tp2-dp2-sp-zero3-padding-rank", tp=2, dp=2, shared={"model__vocab_size": 8}, **SP, **ZERO3),
    layout("tp2-pp2-dp2-sp-zero3", tp=2, pp=2, dp=2, **SP, **ZERO3),
    layout("tp2-pp2-dp2-sp-zero2", tp=2, pp=2, dp=2, **SP, **ZERO2),
    layout("tp2-dp2-sp-zero2-muon", tp=2, dp=2, shared=MUON, **SP, **ZERO2),
    layout("tp2-dp2-sp-zero3-muon", tp=2, dp=2, shared=MUON, **SP, **ZERO3),
]  # fmt: skip
"""In other company: `make test-ci`."""


def _product() -> Iterator[Layout]:
    """Every stage with every tp, pp, sequence parallelism and recomputation, of two replicas."""
    recomputed: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "": ({}, {}),
        "-recompute": (EVERY_LAYER, {}),
        "-recompute-selective": (SELECTIVE, DROP_ATTENTION),
    }
    known = {entry.name for entry in (*QUICK_STAGES, *MORE_STAGES)}
    for stage in (2, 3):
        for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2)):
            for sp in (False, True)[:tp]:
                for how, (changes, shared) in recomputed.items():
                    sizes = "".join(f"{name}{n}-" for name, n in (("tp", tp), ("pp", pp)) if n > 1)
                    name = f"{sizes}dp2-{'sp-' * sp}zero{stage}{how}"
                    if name not in known:
                        more = changes | {axes.ZERO: stage} | (SP if sp else {})
                        yield layout(name, tp=tp, pp=pp, dp=2, shared=shared, **more)


WIDE_STAGES = [
    *_product(),
    layout("dp8-zero2", dp=8, shared=BATCH16, **ZERO2, **SMALL_BUCKETS),
    layout("dp8-zero3", dp=8, shared=BATCH16, **ZERO3, **SMALL_BUCKETS),
    layout("dp2-zero2-no-overlap", dp=2, parallel__overlap_grad_reduce=False, **ZERO2),
    layout("dp2-zero3-no-overlap", dp=2, parallel__overlap_grad_reduce=False, **ZERO3),
    layout("dp2-zero3-recompute-uniform-2", dp=2, **ZERO3, **recompute("full", "uniform", 2)),
    layout("pp2-dp2-zero3-recompute-block", pp=2, dp=2, **ZERO3, **recompute("full", "block", 1)),
    layout("pp2-dp2-gpipe-zero3", pp=2, dp=2, **GPIPE, **ZERO3),
    layout("pp2-dp2-zb-h1-zero3", pp=2, dp=2, **ZB_H1, **ZERO3),
    layout("pp2-dp2-zb-v-zero3", pp=2, dp=2, **ZB_V, **ZERO3, **SMALL_BUCKETS),
    layout("pp2-dp2-zb-v-zero3-recompute-bf16", pp=2, dp=2, shared=BF16, tolerance=HALF, **ZB_V, **ZERO3,
           **EVERY_LAYER),
    layout("tp2-dp4-sp-zero3-llama", tp=2, dp=4, shared=LLAMA, **SP, **ZERO3),
    layout("tp2-pp2-dp2-sp-zero3-galore", tp=2, pp=2, dp=2, shared=GALORE, **SP, **ZERO3),
    layout("tp2-pp2-dp2-sp-zero3-adafactor", tp=2, pp=2, dp=2, shared=ADAFACTOR, **SP, **ZERO3),
    layout("tp2-dp2-zero2-fp16", tp=2, dp=2, shared=FP16, tolerance=HALF, **ZERO2),
    layout("tp2-pp2-dp2-zero3-fp16", tp=2, pp=2, dp=2, shared=FP16, tolerance=HALF, **ZERO3),
]  # fmt: skip
"""The whole product and what else may meet: `make parity-all` and `make nightly`."""
