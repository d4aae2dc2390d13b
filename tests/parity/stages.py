"""Layouts of ZeRO 2: the product with tp, pp, sequence parallelism and recomputation, and other kinds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.parity.kinds import (
    BATCH16,
    BF16,
    DROP_ATTENTION,
    EVERY_LAYER,
    FP16,
    HALF,
    MUON,
    SELECTIVE,
    SMALL_BUCKETS,
    SP,
    Layout,
    layout,
)
from tests.support import axes

ZERO2 = {axes.ZERO: 2}

QUICK_STAGES = [
    layout("dp2-zero2-small-buckets", dp=2, **ZERO2, **SMALL_BUCKETS),
]
"""Every kind once: `make test`."""

MORE_STAGES = [
    layout("dp4-zero2-bf16", dp=4, shared=BF16, tolerance=HALF, **ZERO2, **SMALL_BUCKETS),
    layout("tp2-pp2-dp2-sp-zero2", tp=2, pp=2, dp=2, **SP, **ZERO2),
    layout("tp2-dp2-sp-zero2-muon", tp=2, dp=2, shared=MUON, **SP, **ZERO2),
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
    for stage in (2,):
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
    layout("dp2-zero2-no-overlap", dp=2, parallel__overlap_grad_reduce=False, **ZERO2),
    layout("tp2-dp2-zero2-fp16", tp=2, dp=2, shared=FP16, tolerance=HALF, **ZERO2),
]  # fmt: skip
"""The whole product and what else may meet: `make parity-all` and `make nightly`."""
