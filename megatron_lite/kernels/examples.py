"""Inputs of every op at sizes like a model's, to measure its implementations with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite.kernels import nf4
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.cross_entropy import VocabularyPart
from megatron_lite.kernels.dropout import DropoutCall
from megatron_lite.kernels.random import feature_bits, key
from megatron_lite.kernels.segments import Segments


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a model and a micro batch of it; what is drawn lies on the device in the format dtype.

    documents: in a row; where it is one, nothing is packed.  window: tokens that one sees, None for all.
    """

    tokens: int
    samples: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocabulary: int
    documents: int
    window: int | None
    dropout: float
    device: torch.device
    dtype: torch.dtype

    def draw(self, *shape: int) -> Tensor:
        """Normal values that need a gradient."""
        values = torch.randn(*shape, device=self.device, dtype=torch.float32) * 0.5
        return values.to(self.dtype).requires_grad_(True)

    def stream(self, width: int | None = None) -> Tensor:
        """[s, b, h], or of another width."""
        return self.draw(self.tokens, self.samples, width or self.hidden)

    def drop(self) -> DropoutCall | None:
        """The dropout of one place; None at rate 0."""
        if self.dropout == 0.0:
            return None
        return DropoutCall(
            self.dropout,
            torch.tensor(key(1, 2, 3), device=self.device),
            torch.arange(self.samples, device=self.device),
            torch.arange(self.tokens, device=self.device),
            feature_bits(torch.arange(self.hidden, device=self.device)),
        )


def _joining(sizes: Sizes) -> list[Any]:
    return [sizes.stream(), sizes.stream(), sizes.draw(sizes.hidden), sizes.drop()]


def _attention(sizes: Sizes) -> list[Any]:
    d = sizes.head_size
    q, k, v = (
        sizes.draw(sizes.samples, heads, sizes.tokens, d)
        for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    )
    segments = _segments(sizes) if sizes.documents > 1 else None
    return [q, k, v, AttentionCall(segments=segments, window=sizes.window)]


def _segments(sizes: Sizes) -> Segments:
    """Rows of about equally long documents."""
    rows = sizes.samples * sizes.documents
    borders = [n * sizes.tokens // sizes.documents for n in range(rows + 1)]
    longest = max(b - a for a, b in zip(borders, borders[1:], strict=False))
    cumulative = torch.tensor(borders, dtype=torch.int32, device=sizes.device)
    return Segments(cumulative, longest, sizes.samples, sizes.tokens)


def _split_rotate(sizes: Sizes) -> list[Any]:
    width = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_size
    angle = torch.rand(sizes.tokens, 1, 1, sizes.head_size // 2, device=sizes.device)
    return [sizes.stream(width), sizes.heads, sizes.kv_heads, (angle.cos(), angle.sin())]


def _cross_entropy(sizes: Sizes) -> list[Any]:
    count = sizes.tokens * sizes.samples
    labels = torch.arange(count, device=sizes.device) % sizes.vocabulary
    logits = sizes.stream(
        sizes.vocabulary
    ).detach()  # they are written over: no gradient of their own
    part = VocabularyPart(0, sizes.vocabulary)
    return [logits, labels.view(sizes.tokens, sizes.samples), part, False]


def _cross_entropy_gradients(sizes: Sizes) -> list[Any]:
    logits, labels, part, _ = _cross_entropy(sizes)
    offset = logits.float().logsumexp(-1)
    return [logits, labels, part, offset, torch.ones(labels.shape, device=sizes.device), None]


def _weight_gradient(sizes: Sizes) -> list[Any]:
    dy, x = sizes.stream(sizes.ffn).detach(), sizes.stream().detach()
    return [dy, x, torch.zeros(sizes.ffn, sizes.hidden, device=sizes.device)]


def _unpack(sizes: Sizes) -> list[Any]:
    weight = sizes.draw(sizes.ffn, sizes.hidden)
    return [
        *nf4.pack(weight, math.gcd(64, sizes.hidden)),
        nf4.quantile_pairs(sizes.device),
        sizes.dtype,
    ]


EXAMPLES: Mapping[str, Callable[[Sizes], list[Any]]] = {
    "linear_forward": lambda s: [s.stream(), s.draw(s.ffn, s.hidden), s.draw(s.ffn)],
    "linear_input_gradient": lambda s: [
        s.stream(s.ffn).detach(), s.draw(s.ffn, s.hidden).detach(),
    ],
    "linear_weight_gradient": _weight_gradient,
    "split_rotate": _split_rotate,
    "attention": _attention,
    "layer_norm": lambda s: [s.stream(), s.draw(s.hidden), s.draw(s.hidden), 1e-5],
    "rms_norm": lambda s: [s.stream(), s.draw(s.hidden), None, 1e-5],
    "gelu": lambda s: [s.stream(s.ffn)],
    "gelu_erf": lambda s: [s.stream(s.ffn)],
    "swiglu": lambda s: [s.stream(2 * s.ffn)],
    "unpack_nf4": _unpack,
    "cross_entropy": _cross_entropy,
    "cross_entropy_gradients": _cross_entropy_gradients,
    "dropout": lambda s: [s.stream(), s.drop()],
    "add_dropout": _joining,
    "add_dropout_layer_norm": lambda s: [*_joining(s), s.draw(s.hidden), s.draw(s.hidden), 1e-5],
    "add_dropout_rms_norm": lambda s: [*_joining(s), s.draw(s.hidden), None, 1e-5],
}  # fmt: skip
"""op -> what it is called with; an op without an example is not measured."""
