"""What is measured: models at the sizes of docs/benchmarks.md, who trains them, and what is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu.contestants import (
    Contestant,
    Ours,
    Weights,
    hugging_face_llama,
    plain_gpt2,
)
from megatron_lite.data.batch import Batch

Make = Callable[["Case", Weights, torch.device], Contestant]


@dataclass(frozen=True)
class Asked:
    """A row's tokens/s over another row's must reach `ratio`."""

    row: str
    against: str
    ratio: float


@dataclass(frozen=True)
class Case:
    """One model and batch; rows: name -> how a contestant is made, the first is ours.

    baseline, reference: the row of another program, and its tokens/s on an H100 (docs/benchmarks.md):
    one that is slower than 0.97 of it there has been set up wrongly, and no ratio to it counts.
    together: all contestants fit into the memory of one device at a time.
    """

    key: str
    title: str
    flags: str
    sizes: Mapping[str, int]
    batch: int
    rows: Mapping[str, Make]
    asked: tuple[Asked, ...] = ()
    baseline: str | None = None
    reference: float | None = None
    most_gib: float | None = None
    least_mfu: float | None = None
    together: bool = True

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.sizes["sequence"]

    def batches(self, count: int) -> list[Batch]:
        """Random tokens of so many steps: int64 [b, s + 1]."""
        return [self._batch(seed) for seed in range(count)]

    def _batch(self, seed: int) -> Batch:
        s, b = self.sizes["sequence"], self.batch
        tokens = np.random.default_rng(seed).integers(0, self.sizes["vocabulary"], (b, s + 1))
        return Batch(tokens, np.arange(b), np.ones((b, s), dtype=np.float32))


def _ours(*extra: str, document: int | None = None, attention: str | None = None) -> Make:
    def make(case: Case, weights: Weights, device: torch.device) -> Ours:
        return Ours([*case.flags.split(), *extra], device, document, attention)

    return make


def _flags(sizes: Mapping[str, int], micro: int, batch: int) -> str:
    return (
        f"--num-layers {sizes['layers']} --hidden-size {sizes['hidden']} "
        f"--num-attention-heads {sizes['heads']} --seq-length {sizes['sequence']} "
        f"--vocab-size {sizes['vocabulary']} --tokenizer-type NullTokenizer --mock-data "
        f"--micro-batch-size {micro} --global-batch-size {batch} --train-iters 1000 --lr 1e-4 "
    )


COMPILE, EAGER = "--torch-compile", "--no-torch-compile"
_NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0 "
_COMPILED, _DROPPED = "ours, compiled", "ours, compiled, default dropout"


def _gpt2(tiny: bool) -> Case:
    sizes = {"layers": 12, "hidden": 768, "heads": 12, "sequence": 1024, "vocabulary": 50257}
    if tiny:
        sizes = {"layers": 2, "hidden": 32, "heads": 2, "sequence": 16, "vocabulary": 128}
    batch = 4 if tiny else 64

    def plain(case: Case, weights: Weights, device: torch.device) -> Contestant:
        return plain_gpt2(weights, case.sizes, device)

    return Case(
        key="124m", title="GPT-2 124M, bf16, 64 x 1024 tokens",
        flags=_flags(sizes, batch, batch) + "--bf16 " + _NO_DROPOUT, sizes=sizes, batch=batch,
        rows={
            "ours, eager": _ours(EAGER),
            _COMPILED: _ours(COMPILE),
            "plain GPT-2, compiled": plain,
            _DROPPED: _ours(COMPILE, "--hidden-dropout", "0.1", "--attention-dropout", "0.1"),
        },
        asked=(Asked(_COMPILED, "plain GPT-2, compiled", 1.12), Asked(_DROPPED, _COMPILED, 0.92)),
        baseline="plain GPT-2, compiled", reference=475e3, most_gib=28.0,
    )  # fmt: skip


def _llama(tiny: bool) -> Case:
    sizes = {"layers": 8, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336,
             "sequence": 4096, "vocabulary": 32000}  # fmt: skip
    if tiny:
        sizes = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48,
                 "sequence": 16, "vocabulary": 128}  # fmt: skip
    flags = (
        _flags(sizes, 2, 2) + f"--ffn-hidden-size {sizes['ffn']} --group-query-attention "
        f"--num-query-groups {sizes['kv_heads']} --swiglu --normalization RMSNorm "
        "--position-embedding-type rope --disable-bias-linear "
        "--untie-embeddings-and-output-weights --bf16 "
    )

    def theirs(case: Case, weights: Weights, device: torch.device) -> Contestant:
        return hugging_face_llama(weights, case.sizes, device)

    return Case(
        key="8b", title="eight layers of Llama-8B's shapes, bf16, 2 x 4096 tokens",
        flags=flags + _NO_DROPOUT, sizes=sizes, batch=2,
        rows={
            "ours, eager": _ours(EAGER), _COMPILED: _ours(COMPILE),
            "Hugging Face, compiled": theirs,
        },
        asked=(Asked(_COMPILED, "Hugging Face, compiled", 1.08),),
        baseline="Hugging Face, compiled", reference=39.8e3, least_mfu=0.55, together=False,
    )  # fmt: skip


def _fp16(tiny: bool) -> Case:
    sizes = {"layers": 24, "hidden": 2048, "heads": 16, "sequence": 2048, "vocabulary": 50257}
    if tiny:
        sizes = {"layers": 2, "hidden": 32, "heads": 2, "sequence": 16, "vocabulary": 128}
    flags = _flags(sizes, 4, 8 if tiny else 32) + "--fp16 --initial-loss-scale 65536"
    return Case(
        key="fp16", title="GPT-3 1.3B, fp16, default dropout, 32 x 2048 tokens", flags=flags,
        sizes=sizes, batch=8 if tiny else 32,
        rows={"ours, eager": _ours(EAGER), _COMPILED: _ours(COMPILE)},
        asked=(Asked(_COMPILED, "ours, eager", 1.0),), together=False,
    )  # fmt: skip


def _documents(tiny: bool) -> Case:
    sizes = {"layers": 12, "hidden": 768, "heads": 12, "sequence": 8192, "vocabulary": 50257}
    if tiny:
        sizes = {"layers": 2, "hidden": 32, "heads": 2, "sequence": 32, "vocabulary": 128}
    batch, document = (2, 8) if tiny else (8, 1024)
    apart, whole = "ours, compiled", "ours, compiled, all see all"
    return Case(
        key="documents", title=f"GPT-2 125M, bf16, 8 x 8192 tokens, documents of {document}",
        flags=_flags(sizes, batch, batch) + "--bf16 --reset-attention-mask " + _NO_DROPOUT,
        sizes=sizes, batch=batch,
        rows={
            whole: _ours(COMPILE),
            apart: _ours(COMPILE, document=document),
            "ours, by varlen": _ours(COMPILE, document=document, attention="torch-varlen"),
            "ours, by a dense mask": _ours(COMPILE, document=document, attention="torch-sdpa"),
        },
        asked=(Asked(apart, whole, 0.9),),
    )  # fmt: skip


CASES: Mapping[str, Callable[[bool], Case]] = {
    "124m": _gpt2, "8b": _llama, "fp16": _fp16, "documents": _documents,
}  # fmt: skip
"""Key of ONLY= -> the case; True: at sizes that a CPU steps in a moment, to try the program."""

TABLE = ("124m", "8b")
"""What runs when nothing is named: under five minutes."""


def chosen(only: str | None, *, tiny: bool) -> list[Case]:
    """The cases of ONLY=: one key, several with commas, `all`; None: TABLE."""
    keys = TABLE if only is None else tuple(CASES) if only == "all" else tuple(only.split(","))
    unknown = [key for key in keys if key not in CASES]
    if unknown:
        raise SystemExit(f"ONLY={only}: no case {unknown[0]!r}; there are {', '.join(CASES)}, all")
    return [CASES[key](tiny) for key in keys]
